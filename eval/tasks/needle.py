"""Needles in a haystack: sentences with a secret each, hidden in small talk, and a question about some of them.

The four families of RULER (arXiv 2404.06654) with its counts, in a wording of our own: one needle; four with different
keys, one of which is asked; four numbers for one key, all asked; four keys asked at once. Numbers of seven digits, and
an answer of 128 tokens, as there. What differs: the hay is generated small talk (RULER: essays, or one noise sentence
repeated); keys and numbers are no UUIDs, and no haystack consists of needles (its niah_single_3, niah_multikey_2 and
_3); a length is that of the prompt, without the answer. Only single needles take the run's depths, the others lie
where chance puts them. Single needles with numbers of other lengths and with several words are ours: how long an answer
is decides how much of a text a policy must keep for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from fastkv.eval.example import Draw, Example, Task, contains_all
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.haystack import different, hide, keys, numbers, sentences

SEVERAL = 4
DIGITS, OTHERS = 7, (5, 9, 14)
N_WORDS = 5
WORDS = (
    "apple", "bread", "bridge", "cloud", "doctor", "garden", "green", "horse", "lamp", "mountain", "music", "paper",
    "quiet", "river", "seven", "silver", "stone", "table", "tower", "water", "window", "winter", "wooden", "yellow",
)  # fmt: skip
ANSWER = 128  # tokens

INTRO = "The text below mentions secret {what}s. Remember them: a question about them follows the text.\n\n"

Secrets = Callable[[random.Random], Iterator[str]]  # all different


def needle(key: str, secret: str, what: str = "number") -> str:
    return f"The secret {what} of the {key} is {secret}."


def writer(
    n_keys: int = 1, n_numbers: int = 1, n_asked: int = 1, *, what: str = "number", secrets: Secrets | None = None
) -> Callable[[Draw], Example]:
    """Writes texts with `n_keys` keys of `n_numbers` secrets each, and asks for those of the first `n_asked` keys.

    secrets: what they are, named `what`; None means numbers of DIGITS digits.
    """
    draw_secrets = of_digits(DIGITS) if secrets is None else secrets

    def write(draw: Draw) -> Example:
        rng = draw.rng()
        names, values, hay = keys(rng), draw_secrets(rng), sentences(rng)
        found = {next(names): [next(values) for _ in range(n_numbers)] for _ in range(n_keys)}
        asked = list(found)[:n_asked]
        needles = [
            (rng.random() if draw.slot.depth is None else draw.slot.depth, needle(key, value, what))
            for key, of_key in found.items()
            for value in of_key
        ]
        question, lead = _ask(asked, n_numbers, what)
        answers = tuple(value for key in asked for value in found[key])
        intro = INTRO.format(what=what)

        def build(n: int) -> Example:
            return Example(f"{intro}{hide(hay.first(n), needles)}\n\n{question}", answers, lead, question=question)

        return fit(draw, build)

    return write


def of_digits(digits: int) -> Secrets:
    return lambda rng: numbers(rng, digits)


def of_words(count: int) -> Secrets:
    return lambda rng: different(lambda: " ".join(rng.choice(WORDS) for _ in range(count)))


def _ask(asked: list[str], n_numbers: int, what: str) -> tuple[str, str]:
    """The question and the beginning of its answer."""
    several = n_numbers * len(asked) > 1
    are = f"{what}s" if several else what, "are" if several else "is"
    owners = f"the {asked[0]}" if len(asked) == 1 else ", ".join(f"the {key}" for key in asked)
    question = f"Question: What {are[1]} the secret {are[0]} of {owners}?"
    if several:
        question += " Give them all."
    return question, f"\nAnswer: The secret {are[0]} of {owners} {are[1]}"


def _single(name: str, summary: str, what: str, secrets: Secrets) -> Task:
    return Task(name, summary, contains_all, ANSWER, writer(what=what, secrets=secrets), has_depth=True)


TASKS = (
    Task("niah_single", "one needle, over depths and lengths", contains_all, ANSWER, writer(), has_depth=True),
    *(_single(f"niah_{n}digits", f"one needle with a number of {n} digits", "number", of_digits(n)) for n in OTHERS),
    _single("niah_words", f"one needle with {N_WORDS} words", "phrase", of_words(N_WORDS)),
    Task("niah_multikey", "a needle among others with other keys", contains_all, ANSWER, writer(n_keys=SEVERAL)),
    Task("niah_multivalue", "several numbers of one key, all asked", contains_all, ANSWER, writer(n_numbers=SEVERAL)),
    Task(
        "niah_multiquery", "several keys asked at once", contains_all, ANSWER, writer(n_keys=SEVERAL, n_asked=SEVERAL)
    ),
)
