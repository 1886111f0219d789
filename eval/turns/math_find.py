"""Math.Find: a list of numbers; every question asks for one by its size: the largest, the second smallest, the median.

SCBench's Math.Find (arXiv 2412.10319): the first number of an answer counts. Numbers have five digits and are all
different; an answer has 8 tokens (SCBench: 5), because five digits may take more than 5.
"""

from __future__ import annotations

import re
from itertools import islice

from fastkv.eval.example import Draw, Example
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.haystack import numbers
from fastkv.eval.turns.talk import Family, Talk, Turn

DIGITS, MOST = 5, 50_000  # numbers, of the 90,000 that there are
SHORTEST = 20  # numbers: as many as there may be questions
RANKS = ("", "second ", "third ", "fourth ", "fifth ", "sixth ", "seventh ", "eighth ", "ninth ", "tenth ")
ANSWER = 8  # tokens

INTRO = "The text below is a list of numbers. Remember them: questions about them follow the text.\n\n"


def first_number(prediction: str, example: Example) -> float:
    """1 if the first number of the prediction is the answer."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found.group() in example.answers)


def write(draw: Draw, questions: int) -> Talk:
    rng = draw.rng()
    drawn, source = list[str](), numbers(rng, DIGITS)
    kinds = rng.sample(_kinds(), questions)

    def build(n: int) -> Talk:
        drawn.extend(islice(source, max(0, SHORTEST + n - len(drawn))))
        listed = drawn[: SHORTEST + n]
        ordered = sorted(listed, key=int)
        turns = tuple(_turn(kind, ordered[place]) for kind, place in kinds)
        return Talk(INTRO + ", ".join(listed), (), turns=turns)

    return fit(draw, build, most=MOST - SHORTEST)


def _kinds() -> list[tuple[str, int]]:
    """What can be asked for, and its place among the numbers in ascending order."""
    smallest = [(f"{rank}smallest", place) for place, rank in enumerate(RANKS)]
    return [*smallest, *((f"{rank}largest", -1 - place) for place, rank in enumerate(RANKS))]


def _turn(kind: str, value: str) -> Turn:
    question, lead = f"\n\nQuestion: What is the {kind} number of the list?", f"\nAnswer: The {kind} number is"
    return Turn(Example(question, (value,), lead), f" {value}.", first_number, ANSWER)


FAMILY = Family("math_find", "the largest, second smallest, … number of a list", write)
