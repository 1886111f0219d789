"""H2O: the tokens that receive most attention over the whole prompt, and the recent ones (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.scored import Scored
from fastkv.cache.policy import Observation
from fastkv.cache.setting import number, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class H2O(Scored):
    """Heavy hitters and a recent window: a token's score is the attention that it receives from all queries, summed.

    kv_retention, kv_len, min_tokens: the budget of a layer. recent_share: of that budget, in [0, 1], what goes to the
    most recent tokens; the rest goes to the heavy hitters. The last token is always kept. With keep_mass, which counts
    the attention that is received, the recent tokens are this share of min_tokens.

    What differs from the paper: it compresses the prompt once, where the original also drops tokens while it writes;
    and it sums over the query heads of a KV head, because the cache holds KV heads only. All queries score, which costs
    as much as attention itself, and more than the window's scores of FastKV and SnapKV. Raises FastKVError for a value
    out of range.
    """

    name: ClassVar[str] = "h2o"
    window = 1
    needs_all_queries: ClassVar[bool] = True

    recent_share: float = setting(0.5, number(0, 1), "share of the budget for the most recent tokens", metavar="R")

    def score(self, observed: Observation) -> Tensor:
        from fastkv.cache.scores import received_attention

        n_tokens = observed.k.shape[2]
        received = observed.noted["received"] = received_attention(observed.q, observed.k)
        scores = received[..., : n_tokens - self.window].clone()
        recent = int(self.recent_share * self.fewest(n_tokens)) - self.window
        if recent > 0:
            # No token receives more than one from each query of each head, so these are the best.
            scores[..., -recent:] += n_tokens * observed.q.shape[1]
        return scores

    def mass(self, observed: Observation, scores: Tensor) -> Tensor:
        return observed.noted["received"]
