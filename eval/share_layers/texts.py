"""The texts that layers are compared on: token ids, each text beginning as a prompt does."""

from __future__ import annotations

import random

from fastkv.errors import FastKVError
from fastkv.eval.tune.hay import small_talk
from fastkv.models.text.tokenizer import Tokenizer

_LONGEST_TOKEN = 40  # characters that a token has on average at most, so that no more of a long text is encoded


def texts_of(
    tokenizer: Tokenizer, text: str | None, examples: int, length: int, seed: int
) -> tuple[list[list[int]], bool]:
    """Up to `examples` texts of `length` token ids, BOS included, and whether the text goes on after them.

    text: cut where each is full, so that nothing between them is left out; the last one may be shorter. None: generated
    small talk. Raises FastKVError for a text without tokens, and a length without room for any.
    """
    wanted = examples * length
    if text is None:
        text = "".join(small_talk(random.Random(seed), wanted))  # a sentence has a token at least
    part = text[: _LONGEST_TOKEN * wanted]
    ids = tokenizer.encode(part, begins=False)
    begin = _begin(tokenizer, part, ids)
    room = length - len(begin)
    if room < 1:
        raise FastKVError(
            f"length must be above {len(begin)}, the tokens that every text begins with", setting="length"
        )
    if not ids:
        raise FastKVError("the text has no tokens for this model", setting="text")
    cut = [[*begin, *ids[start : start + room]] for start in range(0, len(ids), room)]
    return cut[:examples], len(cut) > examples or len(part) < len(text)


def _begin(tokenizer: Tokenizer, text: str, ids: list[int]) -> list[int]:
    """What the tokenizer puts before the ids of a text."""
    whole = tokenizer.encode(text)
    ends = range(len(whole) - len(ids) + 1)
    return whole[: next((end for end in ends if whole[end : end + len(ids)] == ids), 0)]
