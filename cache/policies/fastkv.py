"""FastKV: decoupled context reduction and KV compression (arXiv 2502.01068)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastkv.cache.policy import Observation, Policy, Stage
from fastkv.cache.scores import POOLINGS, window_scores
from fastkv.errors import FastKVError, check_choice, check_integer, check_number

MAX_KERNEL = 4095


@dataclass(frozen=True)
class FastKV(Policy):
    """Full context up to the TSP layer, the informative tokens after it, and a small share of KV in every layer.

    tsp_layer: the layer behind whose attention tokens are dropped; None means max(0, L // 2 - 1) of L layers.
    tsp_rate: share of the prompt that goes on behind it, in (0, 1]; 1 turns TSP off.
    kv_retention: share of the prompt that each layer keeps for each KV head, in (0, 1]; 1 keeps all it saw.
    tsp_len, kv_len: the same as absolute numbers of tokens; they win over the rates, and no floor applies to them.
    window: the last tokens, always kept, whose queries score the others. kernel, pooling: smoothing of the scores.
    min_tokens: floor of what the rates give (never above the prompt), so that short prompts are not hurt.

    Raises FastKVError for a value out of range. A rate gives int(rate * n_tokens).

    Known weakness: only the prompt's last tokens vote. A prompt whose question is not in it, or comes first, keeps the
    wrong tokens.
    """

    name: ClassVar[str] = "fastkv"

    tsp_layer: int | None = None
    tsp_rate: float = 0.2
    kv_retention: float = 0.1
    tsp_len: int | None = None
    kv_len: int | None = None
    window: int = 8
    kernel: int = 7
    pooling: str = "max"
    min_tokens: int = 128

    def __post_init__(self) -> None:
        if self.tsp_layer is not None:
            check_integer("tsp_layer", self.tsp_layer, 0)
        check_number("tsp_rate", self.tsp_rate, 0, 1, above=True)
        check_number("kv_retention", self.kv_retention, 0, 1, above=True)
        check_integer("window", self.window, 1)
        check_integer("kernel", self.kernel, 1, MAX_KERNEL)
        if self.kernel % 2 == 0:
            raise FastKVError(f"kernel must be odd, not {self.kernel}", setting="kernel")
        check_choice("pooling", self.pooling, POOLINGS)
        for name in ("tsp_len", "kv_len", "min_tokens"):
            self._check_holds_window(name)

    def _check_holds_window(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        check_integer(name, value, 1)
        if value < self.window:
            raise FastKVError(
                f"{name} must be at least the window ({self.window}), which is always kept, not {value}", setting=name
            )

    def validate(self, n_layers: int) -> None:
        if self.tsp_layer is not None and self.tsp_layer >= n_layers:
            raise FastKVError(
                f"tsp_layer must be below the model's number of layers ({n_layers}), not {self.tsp_layer}",
                setting="tsp_layer",
            )

    def settings(self, n_layers: int) -> dict[str, Any]:
        return asdict(self) | {"tsp_layer": self.tsp_layer_of(n_layers)}

    def tsp_layer_of(self, n_layers: int) -> int:
        """The TSP layer in a model of `n_layers`, the default worked out."""
        return max(0, n_layers // 2 - 1) if self.tsp_layer is None else self.tsp_layer

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        keep = self._count(self.tsp_len, self.tsp_rate, n_tokens)
        first_reduced = self.tsp_layer_of(n_layers) + 1
        if keep >= n_tokens or first_reduced >= n_layers:
            return [Stage(range(n_layers))]
        return [Stage(range(first_reduced), keep), Stage(range(first_reduced, n_layers))]

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return self._count(self.kv_len, self.kv_retention, n_tokens)

    def _count(self, length: int | None, rate: float, n_tokens: int) -> int:
        wanted = max(int(rate * n_tokens), self.min_tokens) if length is None else length
        return min(wanted, n_tokens)

    def score(self, observed: Observation) -> Tensor:
        return window_scores(observed.q, observed.k, self.window, self.kernel, self.pooling)
