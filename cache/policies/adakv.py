"""AdaKV: the KV heads of a layer compete for its budget (arXiv 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkv.cache.policies.snapkv import SnapKV
from fastkv.errors import check_number


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores, of which the best of a whole layer win, so that heads which attend widely keep more.

    kv_retention, kv_len, min_tokens: the MEAN budget of a layer's heads. head_floor: share of it, its window left out,
    in [0, 1], that each head gets before the rest is competed for; 1 is SnapKV. The others are SnapKV's.

    What differs from the paper: what differs in SnapKV, so that KV heads compete and not query heads; and the floor is
    given out first, where the original shrinks what each head has won and adds the floor. Raises FastKVError for a
    value out of range.
    """

    name: ClassVar[str] = "adakv"
    compresses_again: ClassVar[bool] = False
    per_head: ClassVar[bool] = True

    head_floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("head_floor", self.head_floor, 0, 1)

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        batch, n_heads, before = scores.shape
        mean = count - self.window
        safe = scores.topk(int(self.head_floor * mean), dim=-1).indices
        contest = scores.scatter(2, safe, float("inf")).flatten(1)
        winners = contest.topk(n_heads * mean, dim=-1).indices // before  # [B, Hkv * mean], the head of each
        counts = torch.full((batch, n_heads), self.window, dtype=torch.int64, device=scores.device)
        return counts.scatter_add_(1, winners, torch.ones_like(winners))
