"""The bundled model still finds its codes through a tenth of the cache: a small version of the README's table.

Counts, not scores to the digit: another processor may round one answer the other way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastkv import LLM, FastKV, FullKV, SamplingParams, StreamingLLM
from fastkv.cache.policy import Policy
from fastkv.eval.example import Example
from fastkv.eval.tasks.archive import make_prompt

EXAMPLES = 10
PARAMS = SamplingParams(max_tokens=8)
TENTH = {"kv_retention": 0.1, "min_tokens": 8}


@pytest.fixture(scope="module")
def questions(archive_folder: Path) -> list[Example]:
    """Texts of about 600 tokens, the record asked for at five depths."""
    tokenizer = Tokenizer.from_file(str(archive_folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return [make_prompt(encode, 600, depth=(seed % 5) / 4, seed=seed) for seed in range(EXAMPLES)]


def right(llm: LLM, questions: list[Example], policy: Policy) -> int:
    """How many answers begin with the code."""
    outputs = llm.generate([question.text for question in questions], PARAMS, policy)
    pairs = zip(outputs, questions, strict=True)
    return sum(output.text.strip().startswith(question.answers[0]) for output, question in pairs)


def test_a_tenth_of_the_cache_answers_as_well_as_all_of_it(archive_llm: LLM, questions: list[Example]) -> None:
    full = right(archive_llm, questions, FullKV())
    assert full >= EXAMPLES - 2
    assert right(archive_llm, questions, FastKV(**TENTH)) >= full - 1
    assert right(archive_llm, questions, FastKV(tsp_rate=1.0, **TENTH)) >= full - 1


def test_what_keeps_the_wrong_tokens_does_not(archive_llm: LLM, questions: list[Example]) -> None:
    """So that the test above could fail: the paper's scores a layer too early, and tokens that nothing scored."""
    assert right(archive_llm, questions, FastKV.paper(tsp_layer=2, **TENTH)) <= EXAMPLES // 2
    assert right(archive_llm, questions, StreamingLLM(**TENTH)) <= EXAMPLES // 2
