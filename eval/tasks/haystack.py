"""What the needle tasks share: sentences that say nothing to the point, keys, numbers, and needles put at depths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TypeVar

from fastkv.eval.tasks.archive_text import ADJECTIVES, NOUNS, filler, nearest

T = TypeVar("T")


class Pieces:
    """An endless list, drawn when it is asked for: the first n pieces are the same for every n."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._drawn: list[str] = []

    def first(self, n: int) -> list[str]:
        while len(self._drawn) < n:
            self._drawn.append(self._draw())
        return self._drawn[:n]


def sentences(rng: random.Random) -> Pieces:
    """Small talk, any two sentences of which are hardly ever the same."""
    return Pieces(lambda: filler(rng))


def different(draw: Callable[[], T]) -> Iterator[T]:
    """Draws without end, none of which comes twice."""
    seen: set[T] = set()
    while True:
        value = draw()
        if value not in seen:
            seen.add(value)
            yield value


def keys(rng: random.Random) -> Iterator[str]:
    """Names such as "amber-heron"; the small talk has none of them."""
    return different(lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}")


def numbers(rng: random.Random, digits: int) -> Iterator[str]:
    """Numbers of so many digits, the first of them no zero."""
    return different(lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)))


def hide(hay: list[str], needles: list[tuple[float, str]]) -> str:
    """A text of `hay` with each needle after the share of the hay, counted in characters, that its depth says.

    Needles that fall between the same two sentences stand there in the order of their depths.
    """
    placed = [(nearest([len(sentence) + 1 for sentence in hay], depth), needle) for depth, needle in sorted(needles)]
    text: list[str] = []
    for place in range(len(hay) + 1):
        text += [needle for at, needle in placed if at == place]
        text += hay[place : place + 1]
    return " ".join(text)
