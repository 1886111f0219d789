"""Compactor: keys that lie far out, and what the tokens around attend to (arXiv 2507.08143)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.agnostic import QueryAgnostic
from fastkv.cache.setting import number, setting, whole

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation, ScoreSizes

_RIDGE = 1e-2  # what is added to the diagonal, so that keys which span less than their space have a leverage, too


@dataclass(frozen=True, kw_only=True)
class Compactor(QueryAgnostic):
    """Leverage of the keys before their rotation, and attention inside chunks of the prompt, to both sides.

    The leverage says how little the other keys of a head can stand for a key. It is worked out of `sketch` random
    mixtures of the key's values, always the same ones (0: of the values themselves). Attention is that of all tokens
    of a chunk of `chunk` tokens, times the length of the value, the mean of three neighbours. Both are standardised
    over the heads and tokens of a layer; attention weighs `attention_weight`.

    kv_retention, kv_len, min_tokens: the budget of a layer, the mean over its heads where they compete. All queries of
    a chunk score, which is little work, but they must all be there. A sequence that continues is not compressed
    again: its earlier entries have no queries any more.

    What differs from the paper: the number of entries is given, not found by a calibration; the leverage comes from a
    Cholesky factor; fewer tokens are kept at either end; and heads may compete. Reduces no context. Raises FastKVError
    for a value out of range.
    """

    name: ClassVar[str] = "compactor"
    needs_all_queries: ClassVar[bool] = True

    sketch: int = setting(48, whole(0, 4096), "random mixtures of a key's values; 0: the values themselves", metavar="N")
    chunk: int = setting(256, whole(1, 4096), "tokens that attend to one another for the scores", metavar="N")
    attention_weight: float = setting(0.5, number(0), "weight of attention against leverage", metavar="R")

    def between(self, observed: Observation) -> Tensor:
        from fastkv.cache.agnostic import attention_nearby, compactor_scores, leverage, sketch
        from fastkv.cache.scores import tokens_at_a_time

        end = observed.k.shape[2] - self.window
        ends = slice(self.sinks, end)
        head_dim, device = observed.k.shape[-1], observed.k.device
        mixtures = sketch(head_dim, self.sketch, device) if self.sketch else None
        size = tokens_at_a_time(observed.k.shape[0] * observed.k.shape[1] * head_dim, device)
        outlying = leverage(observed.unrotated_keys, self.sinks, end, size, mixtures, _RIDGE)
        received = attention_nearby(observed.q[:, :, ends], observed.k[:, :, ends], self.chunk)
        return compactor_scores(outlying, received, observed.v[:, :, ends], self.attention_weight)
