"""Expected Attention: what later queries will attend to, if they are like those of the prompt (arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.agnostic import QueryAgnostic
from fastkv.cache.setting import number, setting, whole

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation, ScoreSizes


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(QueryAgnostic):
    """The attention of queries that are drawn like those of the prompt, but stand after it.

    Each query head's queries, before their rotation, have a mean and a covariance (those of the sinks left out). Both
    are turned to the mean of the `future` positions after the prompt; so the mean of exp(q k) is known for each key.
    Its share among all keys, the mean over a group, plus `epsilon`, times the length of the value is the score.

    kv_retention, kv_len, min_tokens: the budget of a layer, the mean over its heads where they compete. Queries of all
    tokens must be there. Where heads are even, a sequence that continues is compressed again, by its new queries.

    What differs from the paper: the last tokens always stay, too. Raises FastKVError for a value
    out of range.
    """

    name: ClassVar[str] = "expected-attention"
    needs_all_queries: ClassVar[bool] = True
    compresses_again: ClassVar[bool] = True

    future: int = setting(512, whole(1, 65_536), "positions after the prompt that queries are expected at", metavar="N")
    epsilon: float = setting(0.01, number(0), "added to the expected attention before values weigh it", metavar="R")

    def between(self, observed: Observation) -> Tensor:
        from fastkv.cache.agnostic import expected_attention, query_moments
        from fastkv.cache.scores import tokens_at_a_time, value_norms

        batch, n_heads, n_queries, head_dim = observed.q.shape
        first = 0 if observed.n_past else min(self.sinks, n_queries - 1)
        size = tokens_at_a_time(batch * n_heads * head_dim, observed.q.device)
        mean, covariance = query_moments(observed.unrotated_queries, first, n_queries, size)
        turn = observed.mean_rotation(self.future)
        attended = expected_attention(observed.k[:, :, self.sinks :], mean @ turn.T, turn @ covariance @ turn.T)
        scores = (attended + self.epsilon) * value_norms(observed.v[:, :, self.sinks :])
        return scores[..., : -self.window]

    def scratch(self, sizes: ScoreSizes) -> int:
        from fastkv.cache.scores import tokens_at_a_time

        one = sizes.batch * sizes.n_heads
        block = one * min(sizes.n_entries, tokens_at_a_time(one * sizes.head_dim, sizes.device)) * sizes.head_dim
        return max(3 * block, 2 * block + one * sizes.n_entries, 3 * one * sizes.n_entries)
