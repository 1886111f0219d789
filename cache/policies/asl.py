"""ASL: FastKV whose TSP layer is the one where the ranks of the tokens stop changing (arXiv 2601.07667)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.online import OnlineTSP, first_layer_setting, latest_layer_setting
from fastkv.cache.setting import number, setting, whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ASL(OnlineTSP):
    """The first layer at which the tokens that it would propagate have kept their ranks over the last few layers.

    A token's rank is its place in the order of the TSP scores of a layer. For the tokens that the present layer would
    propagate, the variance of the rank over the last `lookback` layers, averaged over these tokens, is set in relation
    to the variance that ranks in random order have, (n**2 - 1) / 12 for n tokens. Where that falls under `tau`, the
    layer becomes the TSP layer.

    first_layer: the earliest; None means 10 of 32 layers, in proportion. tsp_layer: the latest, taken if none settles;
    None means the last but one. tau: above 0. lookback: at least 2. The others are FastKV's.

    What differs from the paper: it names no reference for "relative" and no number of layers in the description that
    this follows, so both are our reading. Prompts that are prefilled as one tensor decide together, when all have
    settled. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "asl"

    first_layer: int | None = first_layer_setting("10 of 32 layers")
    tsp_layer: int | None = latest_layer_setting("last but one")
    tau: float = setting(
        0.3, number(0, above=True), "tokens are dropped where ranks vary less than this, 1 being random", metavar="T"
    )
    lookback: int = setting(3, whole(2), "layers over which ranks are compared", metavar="N")

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
        from fastkv.cache.scores import ranks

        importance = scores.sum(dim=1)
        self._ranks.append(ranks(importance))
        if layer >= self._latest:
            return scores
        if layer < self._first or len(self._ranks) < self._policy.lookback:
            return None
        top = importance.topk(self._keep, dim=-1).indices
        return scores if bool((relative_variance(list(self._ranks), top) < self._policy.tau).all()) else None


def relative_variance(by_layer: list[Tensor], tokens: Tensor) -> Tensor:
    """How much the ranks [B, n] of some tokens, int64 [B, m], vary from layer to layer: float32 [B], random being 1."""
    import torch

    of_tokens = torch.stack([of_layer.gather(-1, tokens) for of_layer in by_layer])  # [layers, B, m]
    n_tokens = by_layer[0].shape[-1]
    return of_tokens.var(dim=0).mean(dim=-1) / max(1.0, (n_tokens**2 - 1) / 12)
