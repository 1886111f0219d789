"""Needles in a haystack: sentences with a number each, hidden in small talk, and a question about some of them.

The four families of RULER (arXiv 2404.06654) with its counts, in a wording of our own: one needle; four with different
keys, one of which is asked; four numbers for one key, all asked; four keys asked at once. Numbers of seven digits, and
an answer of 128 tokens, as there. What differs: the hay is generated small talk (RULER: essays, or one noise sentence
repeated); keys and numbers are no UUIDs, and no haystack consists of needles (its niah_single_3, niah_multikey_2 and
_3); a length is that of the prompt, without the answer. Only the single needle takes the run's depths, the others lie
where chance puts them.
"""

from __future__ import annotations

from collections.abc import Callable

from fastkv.eval.example import Draw, Example, Task, contains_all
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.haystack import hide, keys, numbers, sentences

SEVERAL = 4
DIGITS = 7
ANSWER = 128  # tokens

INTRO = "The text below mentions secret numbers. Remember them: a question about them follows the text.\n\n"


def needle(key: str, number: str) -> str:
    return f"The secret number of the {key} is {number}."


def writer(n_keys: int = 1, n_numbers: int = 1, n_asked: int = 1) -> Callable[[Draw], Example]:
    """Writes texts with `n_keys` keys of `n_numbers` numbers each, and asks for those of the first `n_asked` keys."""

    def write(draw: Draw) -> Example:
        rng = draw.rng()
        names, values, hay = keys(rng), numbers(rng, DIGITS), sentences(rng)
        found = {next(names): [next(values) for _ in range(n_numbers)] for _ in range(n_keys)}
        asked = list(found)[:n_asked]
        needles = [
            (rng.random() if draw.slot.depth is None else draw.slot.depth, needle(key, value))
            for key, of_key in found.items()
            for value in of_key
        ]
        question, lead = _ask(asked, n_numbers)
        answers = tuple(value for key in asked for value in found[key])
        return fit(draw, lambda n: Example(f"{INTRO}{hide(hay.first(n), needles)}\n\n{question}", answers, lead))

    return write


def _ask(asked: list[str], n_numbers: int) -> tuple[str, str]:
    """The question and the beginning of its answer."""
    several = n_numbers * len(asked) > 1
    are = "numbers" if several else "number", "are" if several else "is"
    owners = f"the {asked[0]}" if len(asked) == 1 else ", ".join(f"the {key}" for key in asked)
    question = f"Question: What {are[1]} the secret {are[0]} of {owners}?"
    if several:
        question += " Give them all."
    return question, f"\nAnswer: The secret {are[0]} of {owners} {are[1]}"


TASKS = (
    Task("niah_single", "one needle, over depths and lengths", contains_all, ANSWER, writer(), has_depth=True),
    Task("niah_multikey", "a needle among others with other keys", contains_all, ANSWER, writer(n_keys=SEVERAL)),
    Task("niah_multivalue", "several numbers of one key, all asked", contains_all, ANSWER, writer(n_numbers=SEVERAL)),
    Task(
        "niah_multiquery", "several keys asked at once", contains_all, ANSWER, writer(n_keys=SEVERAL, n_asked=SEVERAL)
    ),
)
