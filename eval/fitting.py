"""Texts of a wanted length: the longest of a growing family of examples that is not too long.

Tokens are counted on the whole text, because the tokens of its parts need not add up.
"""

from __future__ import annotations

from collections.abc import Callable

from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example

FIRST_STEP = 32
EXAMPLE_SHARE = 0.25  # of a prompt that a worked example may take


def fit(draw: Draw, build: Callable[[int], Example], most: int | None = None) -> Example:
    """`build(n)` for the largest n at which it takes at most the slot's length; one more n would be too long.

    `build(n)` is a text with n pieces of filling, the same pieces each time. `most` is the largest n that it knows.
    Raises FastKVError where `build(0)` is too long, and where `build(most)` is still short of the length by a piece.
    """
    limit, task = draw.limit, draw.slot.task
    low, best = 0, build(0)
    low_size = draw.count(best)
    if low_size > limit:
        raise FastKVError(
            f"{limit} tokens are too short for task {task}: it takes {low_size} without any filling", setting="length"
        )
    high, high_size = None, 0
    halve = False
    while high is None or high - low > 1:
        if high is None:
            middle = _beyond(low, low_size, limit, draw.count(build(0)) if low else low_size)
            middle = middle if most is None else min(middle, most)
        else:
            middle = (low + high) // 2 if halve else _between(low, low_size, high, high_size, limit)
            halve = not halve
        example = build(middle)
        size = draw.count(example)
        if size > limit:
            high, high_size = middle, size
        else:
            low, low_size, best = middle, size, example
            if low == most:
                raise FastKVError(
                    f"{limit} tokens are too many for task {task}: its texts give {size}; ask for less, or give more",
                    setting="length",
                )
    return best


def worked_example(draw: Draw, shown: Example, answer: str) -> str:
    """`shown` with its answer, to stand in front of a question of the same kind; "" where it would take too much."""
    text = f"{shown.text} {answer}\n\n"
    return text if draw.count(Example(text, ())) <= EXAMPLE_SHARE * draw.limit else ""


def _beyond(low: int, low_size: int, limit: int, empty_size: int) -> int:
    """An n that should be too long, by the size of the pieces so far."""
    if low == 0:
        return FIRST_STEP
    piece = max((low_size - empty_size) / low, 0.1)
    return low + 1 + int(1.02 * (limit - low_size) / piece)


def _between(low: int, low_size: int, high: int, high_size: int, limit: int) -> int:
    """Where the straight line from one end to the other meets the limit."""
    guess = low + round((limit - low_size) * (high - low) / (high_size - low_size))
    return min(max(guess, low + 1), high - 1)
