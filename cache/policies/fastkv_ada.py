"""FastKV-Ada: FastKV whose KV heads compete for the budget of their layer (arXiv 2502.01068, 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.adakv import FLOOR_HELP
from fastkv.cache.policies.fastkv import FastKV
from fastkv.cache.setting import number, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FastKVAda(FastKV):
    """FastKV's stages and scores, and AdaKV's budgets: the best entries of a whole layer win.

    kv_retention, kv_len, min_tokens: the MEAN budget of a layer's heads. It counts from the whole prompt; after the TSP
    layer no head keeps more than the tokens that are left. head_floor: share of it, its window left out, in [0, 1],
    that each head gets before the rest is competed for; 1 is FastKV. The others are FastKV's, with its defaults. What
    differs from the papers stands in both classes. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "fastkv-ada"
    per_head = True
    compresses_again: ClassVar[bool] = False  # the earlier entries of its heads differ in number

    head_floor: float = setting(0.2, number(0, 1), FLOOR_HELP, metavar="R")

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        from fastkv.cache.selection import competed_counts

        return competed_counts(scores, count, self.window, self.head_floor)
