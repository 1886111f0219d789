"""How many entries a KV head may hold while an answer grows, and which of them stay when that is reached.

Imports torch for type checkers only, so that the command can check its flag at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkv.errors import check_integer

if TYPE_CHECKING:
    from torch import Tensor

SINKS = 4  # first tokens, which attract attention whatever they say (arXiv 2309.17453)
LEAST = 32  # so small that the newest half and the sinks leave room for others
_LONGEST_INTERVAL = 256  # tokens between two evictions at most


@dataclass(frozen=True)
class DecodeBudget:
    """A limit for the entries of each KV head during decoding, whatever the policy keeps of the prompt.

    entries: what a head holds after an eviction: the newest half, the sinks, and of the others those that received the
    most attention while decoding (heavy hitters, H2O, arXiv 2306.14048). Between two evictions `interval` more come.
    Raises FastKVError for fewer than LEAST.
    """

    entries: int

    def __post_init__(self) -> None:
        check_integer("decode_budget", self.entries, LEAST)

    @property
    def window(self) -> int:
        """The newest tokens, which stay whatever their sums say."""
        return self.entries // 2

    @property
    def interval(self) -> int:
        """Tokens from one eviction to the next: a quarter of the budget, so that memory stays near it."""
        return min(self.entries // 4, _LONGEST_INTERVAL)

    def most(self, kept: int) -> int:
        """Entries that a head ever holds that has `kept` of the prompt."""
        return max(kept, self.entries) + self.interval

    def steps(self, longest: int) -> int:
        """Tokens until the next eviction, where the longest head of any layer holds so many entries."""
        return self.most(longest) - longest

    def best(self, sums: Tensor, positions: Tensor, end: int) -> Tensor:
        """Which entries stay: int64 [Hkv, m], ascending, m the budget or n if that is less.

        sums: float32 [Hkv, n], attention received so far. positions: int64 [Hkv, n], ascending, then -1 where a head is
        shorter: these come last in the result, too. end: the next token's position. Of equal sums the earlier wins.
        """
        pinned = (positions < SINKS) | (positions >= end - self.window)
        scores = sums.masked_fill(pinned, float("inf")).masked_fill_(positions < 0, -1.0)
        return scores.argsort(dim=1, descending=True, stable=True)[:, : self.entries].sort(dim=1).values
