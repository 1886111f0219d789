"""What methods share that find their TSP layer during the prefill: FastKV's two decisions, the layer left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.policy import Stage
from fastkv.errors import FastKVError, check_integer, check_number


@dataclass(frozen=True)
class OnlineTSP(SnapKV):
    """SnapKV's compression, and tokens that are dropped behind a layer which the `watch` of a method finds.

    first_layer, tsp_layer: the layers behind which tokens may be dropped at the earliest and at the latest; None means
    the method's own default. tsp_rate: share of the prompt that goes on, in (0, 1]; 1 turns TSP off. tsp_len: the same
    as an absolute number of tokens; it wins over the rate, and no floor applies to it. The others are SnapKV's. Raises
    FastKVError for a value out of range.
    """

    first_layer: int | None = None
    tsp_layer: int | None = None
    tsp_rate: float = 0.2
    tsp_len: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first_layer", "tsp_layer"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0)
        check_number("tsp_rate", self.tsp_rate, 0, 1, above=True)
        if self.tsp_len is not None:
            self.check_holds_window("tsp_len", self.tsp_len)

    def default_layers(self, n_layers: int) -> tuple[int, int]:
        """first_layer and tsp_layer where they are None."""
        raise NotImplementedError

    def layers_of(self, n_layers: int) -> tuple[int, int]:
        """first_layer and tsp_layer in a model of `n_layers`, the defaults worked out; first <= latest."""
        first, latest = self.default_layers(n_layers)
        if self.tsp_layer is not None:
            latest = self.tsp_layer
        return (min(first, latest) if self.first_layer is None else self.first_layer), latest

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        first, latest = self.layers_of(n_layers)
        if latest >= n_layers:
            raise FastKVError(
                f"tsp_layer must be below the model's number of layers ({n_layers}), not {latest}", setting="tsp_layer"
            )
        if first > latest:
            raise FastKVError(
                f"first_layer must be at most tsp_layer, the latest ({latest}), not {first}", setting="first_layer"
            )

    def settings(self, n_layers: int) -> dict[str, Any]:
        first, latest = self.layers_of(n_layers)
        return super().settings(n_layers) | {"first_layer": first, "tsp_layer": latest}

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        keep = self.count(self.tsp_len, self.tsp_rate, n_tokens)
        first, latest = self.layers_of(n_layers)
        if keep >= n_tokens or first + 1 >= n_layers:  # behind the last layer there is nothing to save
            return [Stage(range(n_layers))]
        return [Stage(range(latest + 1), keep), Stage(range(latest + 1, n_layers))]
