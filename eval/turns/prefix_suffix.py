"""Prefix and suffix: a list of strings; every question tells how one begins and ends.

SCBench's Retr.Prefix-Suffix (arXiv 2412.10319) with made-up words. Beginnings and ends are drawn from a few, so that
other strings share the one or the other, but none both.
"""

from __future__ import annotations

import random
from itertools import islice

from fastkv.eval.example import Draw, Example, contains_all
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.haystack import different
from fastkv.eval.tasks.words import CONSONANTS, VOWELS
from fastkv.eval.turns.talk import Family, Talk, Turn

PARTS = 128  # beginnings, and ends
MOST = PARTS**2  # strings that differ in one of the two
ANSWER = 150  # tokens, as in SCBench

INTRO = "The text below lists words. Remember them: questions about them follow the text.\n\n"


def write(draw: Draw, questions: int) -> Talk:
    rng = draw.rng()
    begins, ends = (list(islice(different(lambda: _part(rng)), PARTS)) for _ in range(2))
    pairs = [(begin, end) for begin in begins for end in ends]
    rng.shuffle(pairs)
    words = [(begin, end, begin + _part(rng) + end) for begin, end in pairs]

    def build(n: int) -> Talk:
        listed = words[: questions + n]
        asked = draw.rng("asked").sample(listed, questions)
        return Talk(INTRO + "\n".join(word for *_, word in listed), (), turns=tuple(_turn(*one) for one in asked))

    return fit(draw, build, most=MOST - questions)


def _part(rng: random.Random) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(2))


def _turn(begin: str, end: str, word: str) -> Turn:
    ask = f'begins with "{begin}" and ends with "{end}"'
    question, lead = f"\n\nQuestion: Which word of the list {ask}?", f"\nAnswer: The word that {ask} is"
    return Turn(Example(question, (word,), lead), f" {word}.", contains_all, ANSWER)


FAMILY = Family("prefix_suffix", "the word of a list that begins and ends as told", write)
