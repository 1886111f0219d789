"""FastKV keeps long answers of real chat models: needles of seven digits at a tenth of the cache.

The texts are eval/tasks/needle.py's. Both kinds of prompt end: the beginning of the answer, and the chat template's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.cache.policy import Policy
from fastkv.eval.example import Draw, Example, Slot
from fastkv.eval.runner import Prompts
from fastkv.eval.tasks import GENERATED

TOKENS, DEPTHS = 1024, (0.2, 0.5, 0.8)
NEEDLE = GENERATED["niah_single"]
PARAMS = SamplingParams(max_tokens=40)
TENTH: dict[str, Any] = {"kv_retention": 0.1, "min_tokens": 1}


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen25c-05b"])
def model(request: pytest.FixtureRequest) -> str:
    """Two chat models, which the repository does not hold."""
    return str(request.param)


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    folder = os.environ.get("FASTKV_REAL_MODELS")
    if folder is None:
        pytest.skip("FASTKV_REAL_MODELS does not name the folder that holds the real models")
    return LLM(Path(folder) / model, dtype="float32", device="cpu")


@pytest.mark.parametrize("lead", [True, False], ids=["answer begun", "template's end"])
def test_a_tenth_of_the_cache_keeps_long_answers(model: str, llm: LLM, lead: bool) -> None:
    """All that the full cache answers. The paper's scores lose some of it; Qwen's seven digits survive them."""
    prompts = Prompts(llm, chat=True, lead=lead)
    examples = [needle(prompts, depth) for depth in DEPTHS]
    full = right(llm, prompts, examples, FullKV())
    assert len(full) >= 2
    assert right(llm, prompts, examples, FastKV(**TENTH)) >= full
    paper_keeps_all = right(llm, prompts, examples, FastKV.paper(**TENTH)) >= full
    assert paper_keeps_all == (model == "qwen25c-05b")


def needle(prompts: Prompts, depth: float) -> Example:
    draw = Draw(Slot(NEEDLE.name, TOKENS, depth, 0), 0, prompts.count, prompts.bare, prompts.decode)
    return NEEDLE.write(draw)


def right(llm: LLM, prompts: Prompts, examples: list[Example], policy: Policy) -> set[int]:
    """Which of the examples are answered."""
    outputs = [llm.generate(prompts.ids(example), PARAMS, policy) for example in examples]
    return {i for i, (out, asked) in enumerate(zip(outputs, examples, strict=True)) if NEEDLE.score(out.text, asked)}
