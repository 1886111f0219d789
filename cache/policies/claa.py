"""CLAA: FastKV whose propagated tokens are chosen by several layers, each head of which counts (arXiv 2602.16054)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.fastkv_paper import FastKVPaper
from fastkv.cache.setting import number, redefined, setting, whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CLAA(FastKVPaper):
    """A token is propagated that any KV head scores high in any of the last layers: no layer alone decides.

    lookback: how many layers up to the TSP layer score (fewer, where there are not so many). full_layers: the first
    layers, which keep everything; above 0 the cache holds more than another policy's of the same retention. tsp_layer,
    tsp_rate, tsp_len: FastKV's, but one of each. The others are FastKV's, with the paper's defaults. What a layer keeps
    in its cache, it chooses by its own scores.

    What differs from the paper: it sums the scores over the query heads of a KV head, because the cache holds KV heads
    only; and it keeps everything in its first layers (4; lookback - 2 in its code), where here that is left to the
    user. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "claa"

    tsp_layer: int | None = setting(
        None, whole(0), "layer after whose attention tokens are dropped", metavar="I", unset="half way up"
    )
    tsp_rate: float = setting(
        0.2, number(0, 1, above=True), "share of the prompt that is propagated; 1 turns TSP off", metavar="R"
    )
    tsp_len: int | None = setting(None, whole(1), "tokens that are propagated, in place of --tsp-rate", metavar="N")
    pooling: str = redefined(FastKVPaper, "pooling", "avg")
    lookback: int = setting(4, whole(1), "layers whose scores choose the tokens that are propagated", metavar="N")
    full_layers: int = setting(0, whole(0), "first layers, which keep all entries", metavar="N")

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return n_tokens if layer < self.full_layers else super().budget(layer, n_layers, n_tokens)

    def least(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return n_tokens if layer < self.full_layers else super().least(layer, n_layers, n_tokens)

    def online_selector(self, n_layers: int, n_tokens: int) -> _LastLayers:
        return _LastLayers(self.tsp_layer_of(n_layers), self.lookback)


class _LastLayers:
    """The scores of the last layers, of each token the highest of its KV heads."""

    def __init__(self, tsp_layer: int, lookback: int) -> None:
        self._tsp_layer = tsp_layer
        self._highest: deque[Tensor] = deque(maxlen=lookback)

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        import torch

        if layer > self._tsp_layer - (self._highest.maxlen or 1):
            self._highest.append(scores.amax(dim=1, keepdim=True))  # [B, 1, T - window]
        return torch.stack(list(self._highest)).amax(dim=0) if layer == self._tsp_layer else None
