"""The text that needles are hidden in: the user's own, or generated small talk. Knows no model."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from itertools import accumulate

from fastkv.eval.tasks.archive_text import nearest
from fastkv.eval.tasks.haystack import sentences

_PIECE = re.compile(r"\S.*?(?:[.!?。！？]+(?=\s)\s*|\n\s*|\Z)", re.DOTALL)


def pieces_of(text: str) -> list[str]:
    """Whole sentences or lines, each with the white space after it; joined they are the text from its first word on."""
    return _PIECE.findall(text)


def small_talk(rng: random.Random, n: int) -> list[str]:
    """`n` generated sentences."""
    return [f"{sentence} " for sentence in sentences(rng).first(n)]


def stretch(pieces: list[str], share: float, rng: random.Random) -> list[str]:
    """Pieces in a row that begin where chance says: at least a `share` of all characters, at most about twice that."""
    before = list(accumulate(map(len, pieces), initial=0))
    wanted = share * before[-1]
    first = rng.randint(0, max((at for at, size in enumerate(before) if size <= before[-1] - wanted), default=0))
    return pieces[first : bisect_left(before, before[first] + 2 * wanted)]


def hidden(pieces: list[str], needle: str, depth: float) -> str:
    """The text with the needle after the share `depth` of its characters, in a line of its own between lines."""
    at = nearest([len(piece) for piece in pieces], depth)
    before, after = "".join(pieces[:at]), "".join(pieces[at:])
    if before and not before[-1].isspace():
        before += " "
    end = "\n" if before.endswith("\n") else " "
    return f"{before}{needle}{end}{after}".rstrip()
