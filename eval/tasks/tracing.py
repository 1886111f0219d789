"""Variable tracking (RULER, arXiv 2404.06654): a chain of assignments in small talk; which variables have the value?

One chain of four hops, and a short worked example of the same kind in front, as in RULER, in a wording of our own. What
differs: the hay is generated small talk (RULER: one noise sentence repeated); the example is left out of texts of which
it would take more than a quarter; an answer has 48 tokens (RULER: 30), because five names may take more than 30.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from string import ascii_uppercase

from fastkv.eval.example import Draw, Example, Task, contains_all
from fastkv.eval.fitting import fit, worked_example
from fastkv.eval.tasks.haystack import different, hide, numbers, sentences

HOPS = 4  # the chain has one variable more
NAME_LENGTH, DIGITS = 5, 5
EXAMPLE_HAY = 5  # sentences

INTRO = "The text below sets variables. Remember which variable has which value.\n\n"


def chain(names: list[str], value: str) -> list[str]:
    """The assignments of a chain, in order."""
    first = f"Variable {names[0]} is set to {value}."
    return [first, *(f"Variable {new} is set to variable {old}." for old, new in pairwise(names))]


def write(draw: Draw) -> Example:
    rng = draw.rng()
    names = different(lambda: "".join(rng.choices(ascii_uppercase, k=NAME_LENGTH)))
    values, hay = numbers(rng, DIGITS), sentences(rng)
    question = _question(rng, names, values)
    shown = _question(rng, names, values)(sentences(draw.rng("example")).first(EXAMPLE_HAY))
    example = worked_example(draw, shown, " ".join(shown.answers))
    return fit(draw, lambda n: question(hay.first(n)).after(example))


def _question(rng: random.Random, names: Iterator[str], values: Iterator[str]) -> Callable[[list[str]], Example]:
    """A chain and the question about it, for any hay; the assignments keep their order."""
    chained, value = [next(names) for _ in range(HOPS + 1)], next(values)
    needles = list(zip(sorted(rng.random() for _ in chained), chain(chained, value), strict=True))
    question = f"Question: Which variables have the value {value}, directly or through other variables? Name them all."
    lead = f"\nAnswer: The {HOPS + 1} variables with the value {value} are:"
    answers = tuple(chained)
    return lambda hay: Example(f"{INTRO}{hide(hay, needles)}\n\n{question}", answers, lead, question=question)


TASKS = (Task("vt", "variable tracking: a chain of assignments", contains_all, 48, write),)
