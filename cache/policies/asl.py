"""ASL: FastKV whose TSP layer is the one where the ranks of the tokens stop changing (arXiv 2601.07667)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastkv.cache.policies.online import OnlineTSP, first_layer_setting, latest_layer_setting
from fastkv.cache.setting import choice, number, setting, whole

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import OnlineSelector


@dataclass(frozen=True, kw_only=True)
class ASL(OnlineTSP):
    """The first layer at which the tokens that it would propagate have kept their ranks over the last few layers.

    A token's rank is its place in the order of the TSP scores of a layer. For the tokens that the present layer would
    propagate, the variance of the rank over the last `lookback` layers, averaged over these tokens, is set in relation
    to the variance that ranks in random order have, (n**2 - 1) / 12 for n tokens. Where that falls under `tau`, the
    layer becomes the TSP layer.

    reading: "paper" is the above. "code" is what the authors' code does: the first layer that is judged sets the
    measure, and a later one becomes the TSP layer where the variance has fallen under `tau` times that. It is averaged
    over all tokens that any of the `lookback` layers would propagate. If no layer settles, nothing is dropped.

    first_layer: the earliest; None means 10 of 32 layers, in proportion. tsp_layer: the latest, taken if none settles;
    None means the last but one, or with "code" the last, after which there is nothing to drop. tau: above 0. lookback:
    at least 2; None means 3, or 8 with "code". The others are FastKV's.

    What differs from the paper: it names no reference for "relative" and no number of layers in the description that
    "paper" follows, so both are our reading. Of "code", the first layer that is judged has `lookback` layers up to it.
    Prompts that are prefilled as one tensor decide together, when all have settled. Raises FastKVError for a value out
    of range.
    """

    name: ClassVar[str] = "asl"

    first_layer: int | None = first_layer_setting("10 of 32 layers")
    tsp_layer: int | None = latest_layer_setting("last but one; code: last")
    reading: str = setting(
        "paper", choice("paper", "code"), "when ranks have settled: as the paper tells or as its code does", metavar="R"
    )
    tau: float = setting(
        0.3, number(0, above=True), "tokens are dropped where ranks vary less than this, 1 being random", metavar="T"
    )
    lookback: int | None = setting(
        None, whole(2), "layers over which ranks are compared", metavar="N", unset="3; code: 8"
    )

    def default_layers(self, n_layers: int) -> tuple[int, int]:
        return round(10 / 32 * n_layers), max(0, n_layers - (1 if self.reading == "code" else 2))

    def settings(self, n_layers: int) -> dict[str, Any]:
        return super().settings(n_layers) | {"lookback": self.lookback_layers}

    @property
    def lookback_layers(self) -> int:
        """`lookback`, the default worked out."""
        return self.lookback or (8 if self.reading == "code" else 3)

    def online_selector(self, n_layers: int, n_tokens: int) -> OnlineSelector:
        keep = max(
            1, self.count(self.tsp_len, self.tsp_rate, n_tokens) - self.window
        )  # of no tokens, none would settle
        settling = _SettlingAsCoded if self.reading == "code" else _Settling
        return settling(self, *self.layers_of(n_layers), keep)


class _Settling:
    """The ranks of the last layers."""

    def __init__(self, policy: ASL, first: int, latest: int, keep: int) -> None:
        self._tau, self._first, self._latest, self._keep = policy.tau, first, latest, keep
        self._ranks: deque[Tensor] = deque(maxlen=policy.lookback_layers)

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        from fastkv.cache.scores import ranks

        importance = scores.sum(dim=1)
        self._ranks.append(ranks(importance))
        if layer >= self._latest:
            return scores
        if layer < self._first or len(self._ranks) < (self._ranks.maxlen or 0):
            return None
        return scores if self._settled() else None

    def _settled(self) -> bool:
        top = self._ranks[-1].topk(self._keep, dim=-1, largest=False).indices
        return bool((relative_variance(list(self._ranks), top) < self._tau).all())


class _SettlingAsCoded(_Settling):
    """Against the variance at the first layer that is judged."""

    _at_first: Tensor | None = None

    def _settled(self) -> bool:
        variance = union_variance(list(self._ranks), self._keep)
        if self._at_first is None:
            self._at_first = variance
            return False
        return bool(((variance < self._tau * self._at_first) | (self._at_first == 0)).all())


def relative_variance(by_layer: list[Tensor], tokens: Tensor) -> Tensor:
    """How much the ranks [B, n] of some tokens, int64 [B, m], vary from layer to layer: float32 [B], random being 1."""
    import torch

    of_tokens = torch.stack([of_layer.gather(-1, tokens) for of_layer in by_layer])  # [layers, B, m]
    n_tokens = by_layer[0].shape[-1]
    return of_tokens.var(dim=0).mean(dim=-1) / max(1.0, (n_tokens**2 - 1) / 12)


def union_variance(by_layer: list[Tensor], keep: int) -> Tensor:
    """How much ranks [B, n] vary over some layers, of the tokens among the first `keep` in any of them: float32 [B]."""
    import torch

    layers = torch.stack(by_layer)  # [layers, B, n]
    among = (layers < keep).any(dim=0)
    return (layers.var(dim=0, unbiased=False) * among).sum(dim=-1) / among.sum(dim=-1)
