"""How many of our functions one step of work goes through: what a reader has to follow, and a CPU to pay for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fastkv
from fastkv import LLM, FastKV
from fastkv.engine.prefill import LayerRun

FOLDER = Path(fastkv.__file__).parent


def crossed(work: Callable[[], object]) -> set[tuple[str, str]]:
    """(file, function) of each function of the package that `work` calls."""
    found: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and path.is_relative_to(FOLDER) and name[0] != "<":
            inside = path.relative_to(FOLDER)
            if inside.parts[0] in (
                "engine",
                "cache",
                "models",
                "kernels",
            ):  # not the tests, nor an environment in the folder
                found.add((str(inside), f"{name}, line {frame.f_code.co_firstlineno}"))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


def test_a_decode_step_goes_through_few_functions(tiny_llm: LLM) -> None:
    cache = tiny_llm.prefill(torch.arange(3, 203)[None], FastKV(min_tokens=8), 2).cache
    tiny_llm.decode(cache, torch.tensor([4]))  # kernels are chosen in the first one
    found = crossed(lambda: tiny_llm.decode(cache, torch.tensor([5])))
    assert len(found) <= 40, sorted(found)
    assert len({path for path, _ in found}) <= 14


def test_a_layer_of_a_prefill_goes_through_few_functions(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers before the TSP layer, which score and select, and compute all tokens."""
    found: dict[int, set[tuple[str, str]]] = {}
    real = LayerRun.layer

    def watched(self: LayerRun, layer: int, *rest: Any) -> Any:
        results: list[Any] = []
        found[layer] = crossed(lambda: results.append(real(self, layer, *rest)))
        return results[0]

    tiny_llm.prefill(torch.arange(3, 203)[None])  # memory is taken in the first one
    monkeypatch.setattr(LayerRun, "layer", watched)
    tiny_llm.prefill(torch.arange(3, 203)[None], FastKV(tsp_layer=2, min_tokens=8))
    assert len(found[0]) <= 64, sorted(found[0])
