"""torch.compile changes how fast the layers run, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastkv import LLM, FastKV, FastKVError, SamplingParams
from fastkv.engine import compile as module

PROMPT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()


def test_compiled_layers_give_the_eager_logits_and_tokens(tiny_llm: LLM, tiny_folder: Path) -> None:
    try:
        llm = LLM(tiny_folder, dtype="float32", device="cpu", compile=True)
    except FastKVError as error:
        pytest.skip(str(error))
    policy, params = FastKV(min_tokens=8), SamplingParams(max_tokens=6, ignore_eos=True)
    expected, found = tiny_llm.prefill(PROMPT, policy), llm.prefill(PROMPT, policy)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found.kept, expected.kept, strict=True))
    assert llm.generate(PROMPT, params, policy).token_ids == tiny_llm.generate(PROMPT, params, policy).token_ids
    assert llm._model.blocks[0].project.__func__ is llm._model.blocks[5].project.__func__  # compiled once for all


def test_without_a_compiler_one_line_says_so(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("\nno g++ found\nand a page of advice")

    monkeypatch.setattr(module.torch, "compile", broken)
    with pytest.raises(FastKVError, match=r"needs a C\+\+ compiler such as g\+\+ \(no g\+\+ found\)") as caught:
        LLM(tiny_folder, device="cpu", compile=True)
    assert caught.value.setting == "compile"
