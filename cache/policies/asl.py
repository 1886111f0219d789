"""ASL: FastKV whose TSP layer is the one where the ranks of the tokens stop changing (arXiv 2601.07667)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkv.cache.policies.online import OnlineTSP
from fastkv.errors import check_integer, check_number


@dataclass(frozen=True)
class ASL(OnlineTSP):
    """The first layer at which the tokens that it would propagate have kept their ranks over the last few layers.

    A token's rank is its place in the order of the TSP scores of a layer. For the tokens that the present layer would
    propagate, the variance of the rank over the last `lookback` layers, averaged over these tokens, is set in relation
    to the variance that ranks in random order have, (n**2 - 1) / 12 for n tokens. Where that falls under `tau`, the
    layer becomes the TSP layer.

    first_layer: the earliest; None means 10 of 32 layers, in proportion. tsp_layer: the latest, taken if none settles;
    None means the last but one. tau: above 0. lookback: at least 2. The others are FastKV's.

    What differs from the paper: it names no reference for "relative" and no number of layers in the description that
    this follows, so both are our reading. Texts that are prefilled as one batch decide together, when all have settled.
    Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "asl"

    tau: float = 0.3
    lookback: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, 0, float("inf"), above=True)
        check_integer("lookback", self.lookback, 2)

    def default_layers(self, n_layers: int) -> tuple[int, int]:
        return round(10 / 32 * n_layers), max(0, n_layers - 2)

    def online_selector(self, n_layers: int, n_tokens: int) -> _Settling:
        keep = self.count(self.tsp_len, self.tsp_rate, n_tokens) - self.window
        return _Settling(self, *self.layers_of(n_layers), max(1, keep))  # of no tokens, no ranks would settle


class _Settling:
    """The ranks of the last layers."""

    def __init__(self, policy: ASL, first: int, latest: int, keep: int) -> None:
        self._policy, self._first, self._latest, self._keep = policy, first, latest, keep
        self._ranks: deque[Tensor] = deque(maxlen=policy.lookback)

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        votes = scores.sum(dim=1)
        self._ranks.append(ranks(votes))
        if layer >= self._latest:
            return scores
        if layer < self._first or len(self._ranks) < self._policy.lookback:
            return None
        top = votes.topk(self._keep, dim=-1).indices
        return scores if bool((relative_variance(list(self._ranks), top) < self._policy.tau).all()) else None


def ranks(votes: Tensor) -> Tensor:
    """votes [B, n] -> float32 [B, n]: the place of each in falling order, from 0."""
    order = votes.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(votes.shape[-1], dtype=torch.float32, device=votes.device).expand_as(votes)
    return torch.empty_like(places).scatter_(-1, order, places)


def relative_variance(by_layer: list[Tensor], tokens: Tensor) -> Tensor:
    """How much the ranks [B, n] of some tokens, int64 [B, m], vary from layer to layer: float32 [B], random being 1."""
    of_tokens = torch.stack([of_layer.gather(-1, tokens) for of_layer in by_layer])  # [layers, B, m]
    n_tokens = by_layer[0].shape[-1]
    return of_tokens.var(dim=0).mean(dim=-1) / max(1.0, (n_tokens**2 - 1) / 12)
