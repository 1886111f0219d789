"""AdaKV: the KV heads of a layer compete for its budget (arXiv 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.setting import number, setting

if TYPE_CHECKING:
    from torch import Tensor

FLOOR_HELP = "share of the budget that each head has for certain"


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV's scores, of which the best of a whole layer win, so that heads which attend widely keep more.

    kv_retention, kv_len, min_tokens: the MEAN budget of a layer's heads. head_floor: share of it, its window left out,
    in [0, 1], that each head gets before the rest is competed for; 1 is SnapKV. The others are SnapKV's.

    What differs from the paper: what differs in SnapKV, so that KV heads compete and not query heads; and the floor is
    given out first, where the original shrinks what each head has won and adds the floor. Raises FastKVError for a
    value out of range.
    """

    name: ClassVar[str] = "adakv"
    per_head = True
    compresses_again: ClassVar[bool] = False  # the earlier entries of its heads differ in number

    head_floor: float = setting(0.2, number(0, 1), FLOOR_HELP, metavar="R")

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        from fastkv.cache.selection import competed_counts

        return competed_counts(scores, count, self.window, self.head_floor)
