"""Prompts, sampling settings and stop strings; and calls with values of any type."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

from fuzz.base_folders import VOCABULARY
from fuzz.running_text import Answer, Call
from fuzz.strategies_values import mostly, scalars, values
from hypothesis import strategies as st

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 16),
    "temperature": st.sampled_from([0, 0.0, 1e-6, 0.5, 1, 3.0, 100, 1e30, 1e-300]),
    "top_k": st.sampled_from([0, 1, 2, 50, VOCABULARY, 10**12]),
    "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.999, 1.0]),
    "min_p": st.sampled_from([0.0, 1e-300, 0.05, 0.9, 1.0]),
    "repetition_penalty": st.sampled_from([1e-6, 0.5, 1.0, 1.3, 1e6]),
    "seed": st.integers(0, 2**63 - 1),
    "ignore_eos": st.booleans(),
}
ODD = [
    Decimal(1),
    Fraction(1, 2),
    1j,
    b"a",
    (),
    [],
    {},
    [[]],
    [1, 2],
    (5, 6),
    [5, "a"],
    ["a", 5],
    [[5], "a"],
    [1.0],
    [True],
    [-1],
    [10**30],
    [[5], [6, 7]],
    ["a", "b"],
    range(3),
    "\ud800",
    {"a": 1},
    float("nan"),
    10**400,
    "a" * 3000,
]


def answers() -> st.SearchStrategy[Answer]:
    text = st.sampled_from(
        ["hello", "hello world", "é", "日本語 ", "\U0001f600", " ", "a\n\n", "<s>", "<tool>", "▁", "\0"]
    ) | st.text(min_size=1, max_size=12)
    inside = st.tuples(st.integers(0, 60), st.integers(1, 4))
    stop = (
        inside
        | inside
        | st.sampled_from(["e", " ", "\n", "\ufffd", "zz", "é", "\0", "</s>"])
        | st.text(min_size=1, max_size=3)
    )
    settings = st.fixed_dictionaries({}, optional=SETTINGS).map(lambda drawn: tuple(drawn.items()))
    return st.builds(Answer, st.sampled_from(["json", "pieces"]), text, settings, st.lists(stop, max_size=4).map(tuple))


def calls() -> st.SearchStrategy[Call]:
    anything = scalars() | st.sampled_from(ODD) | values()
    setting = st.sampled_from([*SETTINGS, "stop"]).flatmap(
        lambda name: st.tuples(st.just(name), mostly(SETTINGS.get(name, st.just("a")), anything, 4))
    )
    settings = st.lists(setting, max_size=3, unique_by=lambda drawn: drawn[0]).map(tuple)
    prompt = mostly(st.sampled_from(["hello", [5, 6, 7], ["a", "b"]]), anything)
    return st.builds(Call, prompt, settings)
