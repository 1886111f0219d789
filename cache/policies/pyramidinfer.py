"""PyramidInfer: fewer tokens from layer to layer, and a layer's cache is what reached it (arXiv 2405.12532)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastkv.cache.policy import Observation, Policy, Stage
from fastkv.cache.scores import recent_attention
from fastkv.errors import FastKVError, check_integer, check_number


@dataclass(frozen=True)
class PyramidInfer(Policy):
    """From `first_layer` on, each layer sends on, and keeps, only what the recent tokens attend to most.

    first_layer: the first that does; None means a quarter of the way up. decay: of the tokens that a layer saw, the
    share that goes on, in (0, 1]. floor: share of the prompt below which none falls, in (0, 1]. window: the recent
    tokens, which vote and always go on. min_tokens: as FastKV's.

    What differs from the paper: each KV head keeps its own best, as many as tokens go on, where the original keeps the
    tokens that go on. The answer's tokens are all kept, where the original goes on to shrink. Raises FastKVError for a
    value out of range.
    """

    name: ClassVar[str] = "pyramidinfer"
    compresses_again: ClassVar[bool] = True

    first_layer: int | None = None
    decay: float = 0.9
    floor: float = 0.2
    window: int = 8
    min_tokens: int = 128

    def __post_init__(self) -> None:
        if self.first_layer is not None:
            check_integer("first_layer", self.first_layer, 0)
        check_number("decay", self.decay, 0, 1, above=True)
        check_number("floor", self.floor, 0, 1, above=True)
        check_integer("window", self.window, 1)
        check_integer("min_tokens", self.min_tokens, self.window)

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        if self.first_layer is not None and self.first_layer >= n_layers:
            raise FastKVError(
                f"first_layer must be below the model's number of layers ({n_layers}), not {self.first_layer}",
                setting="first_layer",
            )

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        made, begun, seen = [], 0, n_tokens
        for layer in range(n_layers - 1):
            keep = self.budget(layer, n_layers, n_tokens)
            if keep < seen:
                made.append(Stage(range(begun, layer + 1), keep))
                begun, seen = layer + 1, keep
        return [*made, Stage(range(begun, n_layers))]

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        first = n_layers // 4 if self.first_layer is None else self.first_layer
        least = min(n_tokens, max(int(self.floor * n_tokens), self.min_tokens))
        return n_tokens if layer < first else max(int(self.decay ** (layer - first + 1) * n_tokens), least)

    def score(self, observed: Observation) -> Tensor:
        return recent_attention(observed.q, observed.k, self.window)
