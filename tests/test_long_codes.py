"""FastKV keeps long answers: a tiny model that was taught codes of 7 to 12 digits, at a tenth of its cache.

An answer is copied from left to right, and the prompt's end attends to where it begins. The paper's pooling keeps three
tokens after that, so long answers break off; the default's forward pooling keeps them whole.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pytest
from places import ROOT
from tokenizers import Tokenizer

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.cache.policy import Policy
from fastkv.eval.example import Example
from fastkv.eval.tasks.archive import LONG, make_prompt

MODEL = ROOT / "examples" / "archive" / "long-codes"
EXAMPLES = 12
PARAMS = SamplingParams(max_tokens=16)
TENTH: dict[str, Any] = {"kv_retention": 0.1, "tsp_rate": 0.2, "min_tokens": 1}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    """Texts of 512 tokens, the record asked for at five depths."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return [make_prompt(encode, 512, (seed % 5) / 4, seed, digits=LONG) for seed in range(EXAMPLES)]


@pytest.fixture(scope="module")
def full(llm: LLM, questions: list[Example]) -> int:
    """What the model can do at all."""
    return whole(digits_right(llm, questions, FullKV()))


def digits_right(llm: LLM, questions: list[Example], policy: Policy) -> list[tuple[int, int]]:
    """Of each answer: how many digits are right before the first wrong one, and how many the code has."""
    outputs = llm.generate([question.text for question in questions], PARAMS, policy)
    codes = [question.answers[0] for question in questions]
    pairs = zip(outputs, codes, strict=True)
    return [(common(output.text.strip(), code), len(code)) for output, code in pairs]


def common(answer: str, code: str) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(answer, code, strict=False))))


def whole(found: list[tuple[int, int]]) -> int:
    """How many answers begin with the whole code."""
    return sum(right == wanted for right, wanted in found)


def test_the_model_knows_long_codes(full: int) -> None:
    assert full >= EXAMPLES - 2


def test_a_tenth_of_the_cache_keeps_long_answers(llm: LLM, questions: list[Example], full: int) -> None:
    assert whole(digits_right(llm, questions, FastKV(**TENTH))) >= full - 1


def test_the_paper_s_scores_lose_them(llm: LLM, questions: list[Example]) -> None:
    """So that the test above could fail, and why the defaults are not the paper's."""
    assert whole(digits_right(llm, questions, FastKV.paper(**TENTH))) <= EXAMPLES // 4


def test_the_pooling_is_what_breaks_them_off(llm: LLM, questions: list[Example]) -> None:
    """A kernel of 7 keeps the digit that the prompt's end attends to and three after it: four digits are right."""
    found = digits_right(llm, questions, FastKV(pooling="max", kernel=7, **TENTH))
    assert sorted(right for right, _ in found)[EXAMPLES // 2] == 4
    assert whole(found) <= EXAMPLES // 4
