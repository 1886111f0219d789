"""Variables over several hops: chains of assignments in small talk; every question asks for the names of one chain.

SCBench's multi-hop tracing (arXiv 2412.10319) with the chains of task vt, whose answers have 48 tokens here, too
(SCBench: 30), because five names may take more than 30.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from string import ascii_uppercase

from fastkv.eval.example import Draw, Example, contains_all
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.haystack import different, hide, numbers, sentences
from fastkv.eval.tasks.tracing import DIGITS, HOPS, INTRO, NAME_LENGTH, chain
from fastkv.eval.turns.talk import Family, Talk, Turn

ANSWER = 48  # tokens


def write(draw: Draw, questions: int) -> Talk:
    rng = draw.rng()
    names = different(lambda: "".join(rng.choices(ascii_uppercase, k=NAME_LENGTH)))
    values, hay = numbers(rng, DIGITS), sentences(rng)
    chains = [([next(names) for _ in range(HOPS + 1)], next(values)) for _ in range(questions)]
    needles = [needle for chained, value in chains for needle in _placed(rng, chained, value)]
    turns = tuple(_turn(chained, value) for chained, value in chains)
    return fit(draw, lambda n: Talk(INTRO + hide(hay.first(n), needles), (), turns=turns))


def _placed(rng: random.Random, names: list[str], value: str) -> Iterator[tuple[float, str]]:
    """The assignments of a chain, in their order, each with its depth."""
    return zip(sorted(rng.random() for _ in names), chain(names, value), strict=True)


def _turn(names: list[str], value: str) -> Turn:
    question = f"\n\nQuestion: Which variables have the value {value}, directly or through other variables?"
    lead = f"\nAnswer: The {len(names)} variables with the value {value} are:"
    asked = Example(f"{question} Name them all.", tuple(names), lead)
    return Turn(asked, f" {', '.join(names)}.", contains_all, ANSWER)


FAMILY = Family("variables", "which variables have a value, over several hops", write)
