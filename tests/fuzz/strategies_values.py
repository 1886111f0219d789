"""Values that no file should hold in that place: wrong types, extremes, odd characters, deep nesting."""

from __future__ import annotations

from typing import Any

from fuzz.edits import GONE, Text
from hypothesis import strategies as st

INTEGERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    4096,
    65537,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
]
NUMBERS = [0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "\0",
    "a",
    "<s>",
    "</s>",
    "<tool>",
    "\n",
    "é",
    "日本",
    "\U0001f600",
    "\ud800",
    "\u202e",
    "\x1b[2J",
    "%s",
    "{}",
    "../x",
    "/",
    "auto",
    "null",
    "1",
]


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any], times: int = 3) -> st.SearchStrategy[Any]:
    """The usual ones so many times as often as the others, of however many kinds these are."""
    return st.integers(0, times).flatmap(lambda number: usual if number else other)


def integers() -> st.SearchStrategy[int]:
    return st.sampled_from(INTEGERS) | st.integers(-10, 400)


def numbers() -> st.SearchStrategy[float]:
    return st.sampled_from(NUMBERS) | st.floats()


def texts() -> st.SearchStrategy[Any]:
    several = st.builds(Text, st.sampled_from(["a", "é", "[", "\n", "<s>"]), st.sampled_from([100, 10_000, 300_000]))
    return st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=()), max_size=8) | several


def scalars() -> st.SearchStrategy[Any]:
    return st.none() | st.booleans() | integers() | numbers() | texts()


def values() -> st.SearchStrategy[Any]:
    """Any JSON value, or GONE."""
    nested = st.recursive(
        scalars(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
        max_leaves=5,
    )
    return st.just(GONE) | scalars() | nested
