"""StructKV: what many layers attend to is propagated, from where attention changes most (arXiv 2604.06746)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.online import OnlineTSP, first_layer_setting, latest_layer_setting
from fastkv.cache.setting import number, setting

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = (0.2, 0.3, 0.5)  # of the changes in entropy, sparsity and variance: the paper's


@dataclass(frozen=True, kw_only=True)
class StructKV(OnlineTSP):
    """FastKV whose TSP scores are summed over the layers up to a pivot, S = sum of score_decay**(pivot - l) * S_l.

    The scores of a layer differ from those of the layer before in their entropy, sparsity and variance. That a change
    was the largest is known once the next layer changes less; this next layer is the pivot, after which tokens are
    dropped. What a layer keeps in its cache, it chooses by its own scores, as in FastKV.

    first_layer: the earliest whose change counts; None means a quarter of the way up. tsp_layer: the pivot if none came
    before; None means max(1, L // 2 - 1) of L layers. score_decay: in (0, 1]. The others are FastKV's.

    What differs from the paper: how a change is measured (all three figures of the scores as a distribution over the
    tokens, between 0 and 1: entropy as a share of the largest; sparsity, the share of tokens below the mean; variance
    as a share of the largest, by its root), and that the pivot is the layer at which the largest change is known,
    whose scores have been computed by then, are our reading. Prompts that are prefilled as one tensor decide together,
    by their mean. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "structkv"

    first_layer: int | None = first_layer_setting("a quarter of the way up")
    tsp_layer: int | None = latest_layer_setting("half way up")
    score_decay: float = setting(
        0.9, number(0, 1, above=True), "weight of a layer's scores in the next one's", metavar="R"
    )

    def default_layers(self, n_layers: int) -> tuple[int, int]:
        return n_layers // 4, min(n_layers - 1, max(1, n_layers // 2 - 1))

    def online_selector(self, n_layers: int, n_tokens: int) -> _Pivot:
        return _Pivot(self.score_decay, *self.layers_of(n_layers))


class _Pivot:
    """The sum of the scores so far, and the largest change."""

    def __init__(self, decay: float, first: int, latest: int) -> None:
        self._decay, self._first, self._latest = decay, first, latest
        self._sum: Tensor | None = None
        self._figures: Tensor | None = None
        self._largest: float | None = None

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        self._sum = scores.clone() if self._sum is None else self._sum.mul_(self._decay).add_(scores)
        change = self._change(scores)
        if layer >= self._latest or (self._largest is not None and change < self._largest):
            return self._sum
        if layer >= self._first:
            self._largest = change
        return None

    def _change(self, scores: Tensor) -> float:
        """How much the figures of a layer differ from those of the layer before; 0 for the first."""
        figures = figures_of(scores.sum(dim=1)).mean(dim=0)
        before, self._figures = self._figures, figures
        if before is None:
            return 0.0
        return float((figures - before).abs() @ figures.new_tensor(_WEIGHTS))


def figures_of(importance: Tensor) -> Tensor:
    """Entropy, sparsity and variance of importance scores [B, n], each between 0 and 1: float32 [B, 3]."""
    import torch

    n_tokens = importance.shape[-1]
    shares = importance / importance.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1) / math.log(max(2, n_tokens))
    sparsity = (shares < 1 / n_tokens).float().mean(dim=-1)
    spread = (shares.square().sum(dim=-1) - 1 / n_tokens).clamp_min(0).sqrt()
    return torch.stack((entropy, sparsity, spread), dim=-1)
