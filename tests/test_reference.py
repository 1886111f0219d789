"""Outside truth: what the paper's own implementation kept, propagated and wrote (float32, CPU) on three models.

Each file holds one prompt with its settings; tests/data/reference has those that may be distributed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from places import OUTSIDE_MODELS, ROOT
from safetensors import safe_open

from fastkv import LLM, FastKV

BUNDLED = sorted((ROOT / "tests" / "data" / "reference").glob("*.safetensors"))
OUTSIDE = sorted((OUTSIDE_MODELS.parent / "reference").glob("stories260K-*.safetensors"))
MODELS = {
    "archive-1.7m": ROOT / "examples" / "archive" / "model",
    "tiny-gqa": ROOT / "tests" / "data" / "tiny-gqa",
    "stories260K": OUTSIDE_MODELS / "stories260K",
}


def settings(stated: dict[str, str]) -> dict[str, Any]:
    """A case's settings as those of FastKV; the reference has no floor, so ours is set to the window."""
    window = int(stated["window_size"])
    common = {
        "tsp_layer": int(stated["tsp_idx"]),
        "window": window,
        "kernel": int(stated["kernel_size"]),
        "pooling": {"maxpool": "max", "avgpool": "avg"}[stated["pooling"]],
        "min_tokens": window,
    }
    if stated["eviction_mode"] == "constant":
        return common | {"tsp_len": int(stated["tsp_len"]), "kv_len": int(stated["max_capacity_prompts"])}
    return common | {"tsp_rate": float(stated["tsp_rate"]), "kv_retention": float(stated["retain_rate"])}


@pytest.mark.parametrize("path", [*BUNDLED, *OUTSIDE], ids=lambda path: path.stem)
def test_matches_the_papers_implementation(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        stated = file.metadata()
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    llm = LLM(MODELS[stated["model"]], dtype="float32", device="cpu")
    pre = llm.prefill(expected["prompt"].tolist(), FastKV.paper(**settings(stated)), max_tokens=len(expected["tokens"]))

    assert torch.equal(pre.tokens[-1][0], expected["tsp"].long())
    for layer, kept in enumerate(pre.kept):
        assert torch.equal(kept[0], expected[f"kept.{layer}"].long()), f"layer {layer} keeps other entries"

    logits, tokens = pre.logits, []
    for step, reference in enumerate(expected["logits"]):
        torch.testing.assert_close(logits[0], reference, atol=1e-3, rtol=0)
        tokens.append(int(logits.argmax()))
        if step + 1 < len(expected["tokens"]):
            logits = llm.decode(pre.cache, torch.tensor(tokens[-1:]))
    assert tokens == expected["tokens"].tolist()


def test_the_bundled_cases_are_there() -> None:
    assert {path.stem.split("-")[0] for path in BUNDLED} == {"archive", "tiny"}
