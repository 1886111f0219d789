"""Archive: one access code among many, in the wording that the bundled model of examples/archive was trained on.

Records shuffled among fillers, one of them at a wanted depth, in texts of a wanted length. The sentences themselves are
archive_text.py's. The scripts of examples/archive make their prompts and training texts with this file.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example, Task, first_word
from fastkv.eval.fitting import adjust
from fastkv.eval.tasks.archive_text import FOUR, Digits, Key, filler, nearest, question, record, records

Encode = Callable[[str], list[int]]  # no BOS added

LONG: Digits = (7, 12)  # long-codes/ in examples/archive
MIN_RECORDS, MAX_RECORDS = 3, 48
MIN_SHARE, MAX_SHARE = 0.1, 0.6  # of a text's tokens that are records


@dataclass(frozen=True)
class Archive:
    """A text: its sentences in order, and the codes that its records give."""

    sentences: list[str]
    codes: dict[Key, str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def askable(self) -> list[Key]:
        """The keys whose code no other record has: the only ones whose answer shows which record was read."""
        uses = Counter(self.codes.values())
        return [key for key, code in self.codes.items() if uses[code] == 1]


def make_prompt(
    encode: Encode, tokens: int, depth: float, seed: int | str, n_records: int | None = None, digits: Digits = FOUR
) -> Example:
    """A prompt of about `tokens` tokens, BOS included; `depth` in [0, 1] is where the asked record lies in the text.

    It ends where the answer ` 5831.\\n` begins; it has that code, of as many digits as `digits` allows, once. Raises
    ValueError where the records do not fit.
    """
    rng = random.Random(seed)
    # Every question has the same number of tokens; BOS and the newline are the other two.
    room = tokens - 2 - len(encode(question(("calm", "owl"))))
    archive = compose(rng, encode, room, n_records, digits)
    if not archive.askable:
        raise ValueError("every code of the text appears twice; take another seed")
    key = rng.choice(archive.askable)
    text, asked = place(archive, key, encode, depth).text, question(key)
    return Example(f"{text}\n{asked}", (archive.codes[key],), question=asked)


def compose(
    rng: random.Random, encode: Encode, tokens: int, n_records: int | None = None, digits: Digits = FOUR
) -> Archive:
    """A shuffled text of at most `tokens` tokens, and less than one sentence short of that.

    `n_records` None draws it: records take 10 to 60 % of the text, 3 to 48 of them. Raises ValueError where the
    records alone do not fit.
    """
    if n_records is None:
        share = rng.uniform(MIN_SHARE, MAX_SHARE)
        count = round(share * tokens / record_size(encode, digits))
        n_records = min(max(count, MIN_RECORDS), MAX_RECORDS)
    codes = records(rng, n_records, digits)
    sentences = [record(key, code) for key, code in codes.items()]
    left = tokens - sum(size(encode, sentence) for sentence in sentences)
    if left < 0:
        raise ValueError(f"{len(codes)} records take {tokens - left} tokens, and the text may have only {tokens}")
    while left > 0:
        sentence = filler(rng)
        left -= size(encode, sentence)
        if left >= 0:
            sentences.append(sentence)
    rng.shuffle(sentences)
    return Archive(sentences, codes)


def place(archive: Archive, key: Key, encode: Encode, depth: float) -> Archive:
    """The same sentences with the record of `key` moved: a share `depth` of the other tokens comes before it."""
    moved = record(key, archive.codes[key])
    others = [sentence for sentence in archive.sentences if sentence != moved]
    index = nearest([size(encode, sentence) for sentence in others], depth)
    return Archive([*others[:index], moved, *others[index:]], archive.codes)


def size(encode: Encode, sentence: str) -> int:
    """Tokens that a sentence takes inside a text, where a space goes before it."""
    return len(encode(" " + sentence))


def record_size(encode: Encode, digits: Digits) -> int:
    """Tokens of a record whose code is as long as `digits` allows."""
    return size(encode, record(("calm", "owl"), ("0123456789" * digits[1])[: digits[1]]))


def write(draw: Draw, digits: Digits = FOUR) -> Example:
    """A prompt of the slot's length with the asked record at the slot's depth."""
    sentence = record_size(draw.encode, digits)
    return adjust(draw, lambda room: _compose(draw, room, digits), draw.limit, sentence)


def _compose(draw: Draw, tokens: int, digits: Digits) -> Example:
    depth = 0.5 if draw.slot.depth is None else draw.slot.depth
    try:
        return make_prompt(draw.encode, tokens, depth, f"{draw.seed}/{draw.slot.id}", digits=digits)
    except ValueError as error:
        message = f"{draw.limit} tokens are too short for task {draw.slot.task} ({error})"
        raise FastKVError(message, setting="length") from None


TASKS = (
    Task("archive", "the bundled model's own: one access code among many", first_word, 8, write, has_depth=True),
    Task("archive_long", "the same with 7 to 12 digits", first_word, 16, partial(write, digits=LONG), has_depth=True),
)
