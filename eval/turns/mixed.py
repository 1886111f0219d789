"""Mixed: a list of keys, then small talk with variables; the questions are about the one and the other in turn.

SCBench (arXiv 2412.10319) mixes tasks that need its data; these two are the generated ones that differ most.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

from fastkv.errors import FastKVError
from fastkv.eval.example import Draw
from fastkv.eval.turns import key_value, variables
from fastkv.eval.turns.talk import Family, Talk


def write(draw: Draw, questions: int) -> Talk:
    try:
        return _of_halves(draw, questions)
    except FastKVError as error:
        raise FastKVError(f"{draw.limit} tokens, in two parts: {error}", setting="length") from None


def _of_halves(draw: Draw, questions: int) -> Talk:
    first = key_value.write(_of_length(draw, draw.limit // 2), (questions + 1) // 2)
    rest = draw.limit - draw.count(first)
    while True:
        second = variables.write(_of_length(draw, rest), questions // 2)
        pairs = zip_longest(first.turns, second.turns)
        turns = tuple(turn for pair in pairs for turn in pair if turn is not None)
        talk = Talk(f"{first.prompt}\n\n{second.prompt}", (), turns=turns)
        over = draw.count(talk) - draw.limit
        if over <= 0:
            return talk
        rest -= over


def _of_length(draw: Draw, length: int) -> Draw:
    return replace(draw, slot=replace(draw.slot, length=length))


FAMILY = Family("mixed", "keys and variables in one text, asked in turn", write)
