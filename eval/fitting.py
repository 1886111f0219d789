"""Texts of a wanted length: the longest of a growing family of examples that is not too long.

Tokens are counted on the whole text, because the tokens of its parts need not add up.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example

ATTEMPTS = 8
FIRST_STEP = 32
NEAR = 0.1  # how far a guess by the size of the first pieces may be off
EXAMPLE_SHARE = 0.25  # of a prompt that a worked example may take

E = TypeVar("E", bound=Example)


def fit(draw: Draw, build: Callable[[int], E], most: int | None = None) -> E:
    """`build(n)` for the largest n at which it takes at most the slot's length; one more n would be too long.

    `build(n)` is a text with n pieces of filling, the same pieces each time. `most` is the largest n that it knows.
    Raises FastKVError where `build(0)` is too long, and where `build(most)` is still short of the length by a piece.
    """
    limit, task = draw.limit, draw.slot.task

    @cache
    def size(n: int) -> int:
        return draw.count(build(n))

    if size(0) > limit:
        raise FastKVError(
            f"{limit} tokens are too short for task {task}: it takes {size(0)} without any filling", setting="length"
        )
    bound = sys.maxsize if most is None else most
    step = min(FIRST_STEP, bound)
    guess = step * (limit - size(0)) / max(size(step) - size(0), 1)
    low, high = min(int((1 - NEAR) * guess), bound), min(int((1 + NEAR) * guess) + 1, bound)
    while size(low) > limit:
        low //= 2
    while size(high) <= limit and high < bound:
        high = min(2 * high, bound)
    if size(high) <= limit:
        raise FastKVError(
            f"{limit} tokens are too many for task {task}: its texts give {size(high)}; ask for less, or give more",
            setting="length",
        )
    return build(low + bisect_right(range(low, high), limit, key=size) - 1)


def adjust(draw: Draw, build: Callable[[int], E | None], room: int, slack: int | None = None) -> E:
    """An example of at most the slot's length, if it can be less than `slack` tokens short of it.

    `build(n)` aims at n tokens by adding up those of parts, or gives None for an n that is too small. Where the whole
    has more tokens or fewer than that, it is asked for as many more or fewer, from `room` on. Raises FastKVError where
    none is short enough.
    """
    best: tuple[int, E] | None = None
    for _ in range(ATTEMPTS):
        example = build(room)
        if example is None:
            break
        missing = draw.limit - draw.count(example)
        if missing >= 0 and (best is None or missing < best[0]):
            best = missing, example
        if missing >= 0 and (slack is None or missing < slack):
            break
        room += missing
    if best is None:
        setting = "longbench_tokens" if draw.slot.length is None else "length"
        raise FastKVError(f"{draw.limit} tokens are too short for task {draw.slot.task}", setting=setting)
    return best[1]


def worked_example(draw: Draw, shown: Example, answer: str) -> str:
    """`shown` with its answer, to stand in front of a question of the same kind; "" where it would take too much."""
    text = f"{shown.text} {answer}\n\n"
    return text if draw.count(Example(text, ())) <= EXAMPLE_SHARE * draw.limit else ""
