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
    Cholesky factor; fewer tokens are kept at either end; and heads may compete. Raises FastKVError
    for a value out of range.
    """

    name: ClassVar[str] = "compactor"
    needs_all_queries: ClassVar[bool] = True

    sketch: int = setting(48, whole(0, 4096), "random mixtures of a key's values; 0: these themselves", metavar="N")
    chunk: int = setting(256, whole(1, 4096), "tokens that attend to one another for the scores", metavar="N")
    attention_weight: float = setting(0.5, number(0), "weight of attention against leverage", metavar="R")

    def between(self, observed: Observation) -> Tensor:
        from fastkv.cache.agnostic import attention_nearby, compactor_scores, leverage, sketch
        from fastkv.cache.scores import tokens_at_a_time

        batch, n_heads, n_entries, head_dim = observed.k.shape
        ends = slice(self.sinks, n_entries - self.window)
        mixtures = sketch(head_dim, self.sketch, observed.k.device) if self.sketch else None
        size = tokens_at_a_time(batch * n_heads * self._width(head_dim), observed.k.device)
        outlying = leverage(observed.unrotated_keys, ends.start, ends.stop, size, mixtures, _RIDGE)
        received = attention_nearby(observed.q[:, :, ends], observed.k[:, :, ends], self.chunk)
        values = observed.v[:, :, ends]
        return compactor_scores(outlying, received, values, self.attention_weight, observed.all_heads)

    def _width(self, head_dim: int) -> int:
        """Values of a key that are held at a time, in float32: twice its mixtures, for float64."""
        return max(head_dim, 2 * (self.sketch or head_dim))

    def scratch(self, sizes: ScoreSizes) -> int:
        from fastkv.cache.agnostic import chunks_at_a_time
        from fastkv.cache.scores import tokens_at_a_time

        keys, queries = sizes.batch * sizes.n_kv_heads, sizes.batch * sizes.n_heads
        width = keys * self._width(sizes.head_dim)
        block = width * min(sizes.n_entries, tokens_at_a_time(width, sizes.device))
        rows = keys * sizes.n_entries * (self.sketch or sizes.head_dim)
        near = min(sizes.n_entries, self.chunk * chunks_at_a_time(queries, self.chunk, sizes.device))
        attention = 2 * queries * near * (min(self.chunk, sizes.n_entries) + sizes.head_dim)
        return max(rows + max(rows, block), attention) + 3 * keys * sizes.n_entries
