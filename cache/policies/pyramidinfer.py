"""PyramidInfer: fewer tokens from layer to layer, and a layer's cache is what reached it (arXiv 2405.12532)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.compressed import MIN_TOKENS_HELP, WINDOW_HELP
from fastkv.cache.policy import Observation, Policy, Stage
from fastkv.cache.setting import number, setting, whole
from fastkv.errors import FastKVError, check_integer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PyramidInfer(Policy):
    """From `first_layer` on, each layer propagates, and keeps, only what the recent tokens attend to most.

    first_layer: the first that does; None means a quarter of the way up. decay: of the tokens that a layer saw, the
    share that is propagated, in (0, 1]. floor: share of the prompt below which none falls, in (0, 1]. window: the
    recent tokens, whose queries score the others and which are always propagated. min_tokens: as FastKV's.

    What differs from the paper: each KV head keeps its own best, as many as are propagated, where the original keeps
    the propagated tokens. The answer's tokens are all kept, where the original shrinks further. Raises FastKVError for
    a value out of range.
    """

    name: ClassVar[str] = "pyramidinfer"
    compresses_again: ClassVar[bool] = True

    first_layer: int | None = setting(
        None, whole(0), "first layer that may drop tokens", metavar="I", unset="a quarter of the way up"
    )
    decay: float = setting(0.9, number(0, 1, above=True), "share of what a layer saw that is propagated", metavar="R")
    floor: float = setting(0.2, number(0, 1, above=True), "share of the prompt that is always propagated", metavar="R")
    window: int = setting(8, whole(1), WINDOW_HELP, metavar="W")
    min_tokens: int = setting(128, whole(1), MIN_TOKENS_HELP, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
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
        from fastkv.cache.scores import recent_attention

        return recent_attention(observed.q, observed.k, self.window)
