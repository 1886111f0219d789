"""Key → value: a list of keys with a number each; every question asks for one of them.

SCBench's Retr.KV (arXiv 2412.10319) in a wording of our own: keys are a name and a number, not UUIDs, and values have
seven digits.
"""

from __future__ import annotations

from fastkv.eval.example import Draw, Example, contains_all
from fastkv.eval.fitting import fit
from fastkv.eval.tasks.archive_text import ADJECTIVES, NOUNS
from fastkv.eval.tasks.haystack import different, numbers
from fastkv.eval.turns.talk import Family, Talk, Turn

DIGITS, MOST_SUFFIX = 7, 1000
ANSWER = 150  # tokens, as in SCBench

INTRO = "The text below lists keys with their values. Remember them: questions about them follow the text.\n\n"


def write(draw: Draw, questions: int) -> Talk:
    rng = draw.rng()
    keys = different(lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(MOST_SUFFIX)}")
    values, drawn = numbers(rng, DIGITS), list[tuple[str, str]]()

    def build(n: int) -> Talk:
        while len(drawn) < questions + n:
            drawn.append((next(keys), next(values)))
        pairs = drawn[: questions + n]
        listed = "\n".join(f"{key}: {value}" for key, value in pairs)
        asked = draw.rng("asked").sample(pairs, questions)
        return Talk(INTRO + listed, (), turns=tuple(_turn(*pair) for pair in asked))

    return fit(draw, build)


def _turn(key: str, value: str) -> Turn:
    question, lead = f"\n\nQuestion: What is the value of the key {key}?", f"\nAnswer: The value of the key {key} is"
    return Turn(Example(question, (value,), lead), f" {value}.", contains_all, ANSWER)


FAMILY = Family("kv", "the value of a key in a long list", write)
