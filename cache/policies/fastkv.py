"""FastKV: decoupled context reduction and KV compression (arXiv 2502.01068)."""

from __future__ import annotations

from collections.abc import Callable
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
    Several reductions down the stack are a tuple of layers, and of rates or lengths that fall: tsp_layer=(9, 15, 23),
    tsp_rate=(0.5, 0.2, 0.1). At each of these layers its own votes choose from the tokens that are left.
    kv_retention: share of the prompt that each layer keeps for each KV head, in (0, 1]; 1 keeps all it saw.
    tsp_len, kv_len: the same as absolute numbers of tokens; they win over the rates, and no floor applies to them.
    window: the last tokens, always kept, whose queries score the others. kernel, pooling: smoothing of the scores.
    min_tokens: floor of what the rates give (never above the prompt), so that short prompts are not hurt.

    Raises FastKVError for a value out of range. A rate gives int(rate * n_tokens).

    Known weakness: only the prompt's last tokens vote. A prompt whose question is not in it, or comes first, keeps the
    wrong tokens.
    """

    name: ClassVar[str] = "fastkv"
    compresses_again: ClassVar[bool] = True

    tsp_layer: int | tuple[int, ...] | None = None
    tsp_rate: float | tuple[float, ...] = 0.2
    kv_retention: float = 0.1
    tsp_len: int | tuple[int, ...] | None = None
    kv_len: int | None = None
    window: int = 8
    kernel: int = 7
    pooling: str = "max"
    min_tokens: int = 128

    def __post_init__(self) -> None:
        layers = self._each("tsp_layer", lambda name, layer: check_integer(name, layer, 0))
        rates = self._each("tsp_rate", lambda name, rate: check_number(name, rate, 0, 1, above=True))
        self.check_scoring()
        self.check_budget()
        lengths = self._each("tsp_len", self.check_holds_window)
        name, shares = ("tsp_rate", rates) if self.tsp_len is None else ("tsp_len", lengths)
        if list(layers) != sorted(set(layers)):
            raise FastKVError(f"tsp_layer must rise, not {self.tsp_layer}", setting="tsp_layer")
        if list(shares) != sorted(set(shares), reverse=True):
            raise FastKVError(f"{name} must fall, not {getattr(self, name)}", setting=name)
        if len(shares) != max(1, len(layers)):
            raise FastKVError(
                f"{name} must have a value for each TSP layer: {len(shares)} for {max(1, len(layers))}", setting=name
            )

    def _each(self, name: str, check: Callable[[str, Any], None]) -> tuple[Any, ...]:
        """The values of a setting that may be one, several or None; each is checked."""
        value = getattr(self, name)
        values = tuple(value) if isinstance(value, (tuple, list)) else () if value is None else (value,)
        if isinstance(value, list):
            object.__setattr__(self, name, values)  # hashable, like any other setting
        if value is not None and not values:
            raise FastKVError(f"{name} must not be empty", setting=name)
        for one in values:
            check(name, one)
        return values

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        layer = self.tsp_layers_of(n_layers)[-1]
        if layer >= n_layers:
            raise FastKVError(
                f"tsp_layer must be below the model's number of layers ({n_layers}), not {layer}", setting="tsp_layer"
            )

    def settings(self, n_layers: int) -> dict[str, Any]:
        layers = self.tsp_layers_of(n_layers)
        return super().settings(n_layers) | {"tsp_layer": layers if isinstance(self.tsp_layer, tuple) else layers[0]}

    def tsp_layer_of(self, n_layers: int) -> int:
        """The (first) TSP layer in a model of `n_layers`, the default worked out."""
        return self.tsp_layers_of(n_layers)[0]

    def tsp_layers_of(self, n_layers: int) -> tuple[int, ...]:
        """The TSP layers in a model of `n_layers`, the default worked out."""
        return self._each("tsp_layer", lambda name, layer: None) or (max(0, n_layers // 2 - 1),)

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        made: list[Stage] = []
        first, seen = 0, n_tokens
        for layer, keep in zip(self.tsp_layers_of(n_layers), self._propagated(n_tokens), strict=True):
            if keep < seen and layer + 1 < n_layers:
                made.append(Stage(range(first, layer + 1), keep))
                first, seen = layer + 1, keep
        return [*made, Stage(range(first, n_layers))]

    def _propagated(self, n_tokens: int) -> list[int]:
        """How many tokens go on behind each TSP layer."""
        if self.tsp_len is not None:
            return [self.count(length, 1.0, n_tokens) for length in self._each("tsp_len", lambda name, length: None)]
        return [self.count(None, rate, n_tokens) for rate in self._each("tsp_rate", lambda name, rate: None)]
