"""StructKV: what many layers attend to is propagated, from where attention changes most (arXiv 2604.06746)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.online import OnlineTSP, first_layer_setting, latest_layer_setting
from fastkv.cache.setting import choice, number, setting

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = (0.2, 0.3, 0.5)  # of the changes in entropy, sparsity and variance: the paper's


@dataclass(frozen=True, kw_only=True)
class StructKV(OnlineTSP):
    """FastKV whose TSP scores are summed over the layers up to a pivot, S = sum of score_decay**(pivot - l) * S_l.

    The scores of a layer differ from those of the layer before in their entropy, sparsity and variance. That a change
    was the largest is known once the next layer changes less; this next layer is the pivot, after which tokens are
    dropped. What a layer keeps in its cache, it chooses by its own scores, as in FastKV.

    pivot: "change" is the above. With "rise" a change counts only where attention narrows: entropy falls, the share of
    the tokens that would be propagated in the sum of the scores rises (in place of sparsity), and variance rises.

    first_layer: the earliest whose change counts; None means a quarter of the way up. tsp_layer: the pivot if none came
    before; None means max(1, L // 2 - 1) of L layers. score_decay: in [0, 1]; 0 takes the pivot's scores alone. The
    others are FastKV's.

    What differs from the paper: how a change is measured (all three figures of the scores as a distribution over the
    tokens, between 0 and 1: entropy as a share of the largest; sparsity, the share of tokens below the mean; variance
    as a share of the largest, by its root), that "change" knows no direction, and that the pivot is the layer at which
    the largest change is known, whose scores have been computed by then, are our reading. Prompts that are prefilled as
    one tensor decide together, by their mean. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "structkv"

    first_layer: int | None = first_layer_setting("a quarter of the way up")
    tsp_layer: int | None = latest_layer_setting("half way up")
    pivot: str = setting(
        "change",
        choice("change", "rise"),
        "tokens are dropped after the largest change of the scores, or rise of their concentration",
        metavar="P",
    )
    score_decay: float = setting(0.9, number(0, 1), "weight of a layer's scores in the next one's", metavar="R")

    def default_layers(self, n_layers: int) -> tuple[int, int]:
        return n_layers // 4, min(n_layers - 1, max(1, n_layers // 2 - 1))

    def online_selector(self, n_layers: int, n_tokens: int) -> _Pivot:
        keep = self.count(self.tsp_len, self.tsp_rate, n_tokens) - self.window if self.pivot == "rise" else None
        return _Pivot(self.score_decay, *self.layers_of(n_layers), keep)


class _Pivot:
    """The sum of the scores so far, and the largest change.

    keep: tokens whose share in the scores counts, and changes have a direction; None: neither.
    """

    def __init__(self, decay: float, first: int, latest: int, keep: int | None) -> None:
        self._decay, self._first, self._latest, self._keep = decay, first, latest, keep
        self._sum: Tensor | None = None
        self._figures: Tensor | None = None
        self._largest: float | None = None

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        self._sum = scores.clone() if self._sum is None else self._sum.mul_(self._decay).add_(scores)
        change = self._change(scores)
        if layer >= self._latest or (self._largest is not None and change < self._largest):
            return self._sum
        if layer >= self._first and (self._keep is None or change > 0):  # attention that widens is no pivot
            self._largest = change
        return None

    def _change(self, scores: Tensor) -> float:
        """How much the figures of a layer differ from those of the layer before; 0 for the first."""
        figures = figures_of(scores.sum(dim=1), self._keep).mean(dim=0)
        before, self._figures = self._figures, figures
        if before is None:
            return 0.0
        if self._keep is None:
            return float((figures - before).abs() @ figures.new_tensor(_WEIGHTS))
        return float((figures - before) @ figures.new_tensor(_WEIGHTS).mul_(figures.new_tensor((-1, 1, 1))))


def figures_of(importance: Tensor, keep: int | None = None) -> Tensor:
    """Entropy, sparsity and variance of importance scores [B, n], each between 0 and 1: float32 [B, 3].

    keep: in place of sparsity the share of the `keep` best in the sum.
    """
    import torch

    n_tokens = importance.shape[-1]
    shares = importance / importance.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1) / math.log(max(2, n_tokens))
    if keep is None:
        narrow = (shares < 1 / n_tokens).float().mean(dim=-1)
    else:
        narrow = shares.topk(min(keep, n_tokens), dim=-1).values.sum(dim=-1)
    spread = (shares.square().sum(dim=-1) - 1 / n_tokens).clamp_min(0).sqrt()
    return torch.stack((entropy, narrow, spread), dim=-1)
