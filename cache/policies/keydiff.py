"""KeyDiff: the keys that are least like the mean key, whatever is asked (arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.agnostic import QueryAgnostic

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation, ScoreSizes


@dataclass(frozen=True, kw_only=True)
class KeyDiff(QueryAgnostic):
    """A key is worth minus its cosine to the mean of the unit keys of its head. No query is looked at.

    kv_retention, kv_len, min_tokens: the budget of a layer, the mean over its heads where they compete. Scoring costs
    next to nothing. Where heads are even, a sequence that continues is compressed again.

    What differs from the paper: it reads the prompt in blocks, and drops entries after each, where ours sees the
    whole prompt first; the first and the last tokens always stay; and heads may compete. Raises
    FastKVError for a value out of range.
    """

    name: ClassVar[str] = "keydiff"
    compresses_again: ClassVar[bool] = True

    def between(self, observed: Observation) -> Tensor:
        from fastkv.cache.agnostic import unlikeness

        return unlikeness(observed.k)[..., self.sinks : -self.window]

    def scratch(self, sizes: ScoreSizes) -> int:
        from fastkv.cache.scores import tokens_at_a_time

        one = sizes.batch * sizes.n_kv_heads
        block = min(sizes.n_entries, tokens_at_a_time(one * sizes.head_dim, sizes.device))
        return one * (2 * block * sizes.head_dim + 2 * sizes.n_entries)
