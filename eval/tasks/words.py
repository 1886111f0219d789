"""Common words and frequent words (RULER, arXiv 2404.06654): what comes up most often, all over the text?

As in RULER: ten common words, 30 times each among words that come up 3 times, or in short texts 6 times among single
ones, and a worked example in front; three frequent words by Zipf's law with an exponent of 2; answers of 120 and 50
tokens. What differs: the words are made up, so that no list of words is needed and no model can tell a word's frequency
from having read it before, and all have six letters, so that none is a part of another. They take more tokens than
RULER's English words, so the 30 and 3 begin where the common words leave half of the text, not at 4,096 tokens, and in
shorter texts than RULER's the common words come up 4 times. The example is left out of texts of which it would take
more than a quarter. In the coded text the most frequent word is asked for like the next two (in RULER it is dots, to be
ignored), and all words of Zipf's tail come up, once each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastkv.eval.example import Draw, Example, Task, contains_all
from fastkv.eval.fitting import fit, worked_example
from fastkv.eval.tasks.haystack import Pieces, different

COMMON = 10  # words asked for in cwe
# How often each common word comes up, and each other one: the first pair whose common words leave half of the text.
RATES = ((30, 3), (6, 1), (4, 1))
# The same for worked examples, with the number of other words: the first that is short enough.
EXAMPLES = ((10, 3, 30), (3, 1, 10))
FREQUENT = 3  # words asked for in fwe
ZIPF = 2.0  # the word of rank k comes up in proportion to k^-2
ZETA = 1.6449340668482264  # the sum of k^-2 over all k
SHORTEST = 40  # words of a text in which the three most frequent ones stand out

CONSONANTS, VOWELS, SYLLABLES = "bdfgklmnprstvz", "aeiou", 3


def made_up(rng: random.Random) -> Pieces:
    """Words such as "tokari", all different."""
    words = different(lambda: "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(SYLLABLES)))
    return Pieces(lambda: next(words))


def write_common(draw: Draw) -> Example:
    """A numbered list in which ten words come up often and the others hardly ever."""
    words = made_up(draw.rng())
    examples = (_example(draw, *rate) for rate in EXAMPLES)
    example = next(filter(None, examples), "")

    def build(often: int, seldom: int, others: int) -> Example:
        chosen = words.first(COMMON + -(-others // seldom))
        return _common(draw.rng("order"), chosen, often, seldom, others).after(example)

    sizes = ((rate, draw.count(build(*rate, 0))) for rate in RATES)
    often, seldom = next((rate for rate, size in sizes if 2 * size <= draw.limit), RATES[-1])
    return fit(draw, lambda n: build(often, seldom, n))


def _common(rng: random.Random, words: list[str], often: int, seldom: int, others: int) -> Example:
    """The question about a list of the first ten words, `often` times each, and `others` entries of the rest."""
    common, rest = words[:COMMON], words[COMMON:]
    entries = common * often + [rest[i // seldom] for i in range(others)]
    rng.shuffle(entries)
    text = f"Some words of this numbered list come up often. Remember them.\n\n{_numbered(entries)}\n\n"
    question = f"Question: What are the {COMMON} words that come up most often in the list above?"
    lead = f"\nAnswer: The {COMMON} words that come up most often in the list are:"
    return Example(text + question, tuple(common), lead, question=question)


def _example(draw: Draw, often: int, seldom: int, n_others: int) -> str:
    rng = draw.rng("example", often)
    shown = _common(rng, made_up(rng).first(COMMON + n_others), often, seldom, n_others * seldom)
    return worked_example(draw, shown, _numbered(shown.answers))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def write_frequent(draw: Draw) -> Example:
    """Coded words whose frequencies follow Zipf's law."""
    words = made_up(draw.rng())
    question = f"Question: What are the {FREQUENT} words that come up most often in the coded text above?"
    lead = f"\nAnswer: The {FREQUENT} words that come up most often in the coded text are:"

    def build(n: int) -> Example:
        counts = zipf_counts(SHORTEST + n)
        chosen = words.first(len(counts))
        text = [word for word, count in zip(chosen, counts, strict=True) for _ in range(count)]
        draw.rng("order").shuffle(text)
        intro = "Some words of this coded text come up more often than others. Keep count of them."
        answers = tuple(chosen[:FREQUENT])
        return Example(f"{intro}\n\n{' '.join(text)}\n\n{question}", answers, lead, question=question)

    return fit(draw, build)


def zipf_counts(total: int) -> list[int]:
    """How often the word of each rank comes up in a text of `total` words: one time at the least."""
    counts: list[int] = []
    left = total
    while left > 0:
        wanted = max(int(total * (len(counts) + 1) ** -ZIPF / ZETA), 1)
        counts.append(min(wanted, left))
        left -= counts[-1]
    return counts


TASKS = (
    Task("cwe", "common words extraction from a list", contains_all, 120, write_common),
    Task("fwe", "frequent words extraction, Zipf's law", contains_all, 50, write_frequent),
)
