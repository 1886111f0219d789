"""FastKV: decoupled context reduction and KV compression (arXiv 2502.01068)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastkv.cache.policies.compressed import WindowScored
from fastkv.cache.policy import Stage
from fastkv.errors import FastKVError, check_integer, check_number


@dataclass(frozen=True)
class FastKV(WindowScored):
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
        self.check_scoring()
        self.check_budget()
        self.check_holds_window("tsp_len")

    def validate(self, n_layers: int) -> None:
        if self.tsp_layer is not None and self.tsp_layer >= n_layers:
            raise FastKVError(
                f"tsp_layer must be below the model's number of layers ({n_layers}), not {self.tsp_layer}",
                setting="tsp_layer",
            )

    def settings(self, n_layers: int) -> dict[str, Any]:
        return super().settings(n_layers) | {"tsp_layer": self.tsp_layer_of(n_layers)}

    def tsp_layer_of(self, n_layers: int) -> int:
        """The TSP layer in a model of `n_layers`, the default worked out."""
        return max(0, n_layers // 2 - 1) if self.tsp_layer is None else self.tsp_layer

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        keep = self.count(self.tsp_len, self.tsp_rate, n_tokens)
        first_reduced = self.tsp_layer_of(n_layers) + 1
        if keep >= n_tokens or first_reduced >= n_layers:
            return [Stage(range(n_layers))]
        return [Stage(range(first_reduced), keep), Stage(range(first_reduced, n_layers))]
