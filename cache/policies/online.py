"""What methods share that find their TSP layer during the prefill: FastKV's two decisions, the layer left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.policy import Stage
from fastkv.cache.setting import number, setting, whole
from fastkv.errors import FastKVError


def first_layer_setting(unset: str) -> Any:
    """The setting `first_layer`, whose default differs by method."""
    return setting(None, whole(0), "first layer that may drop tokens", metavar="I", unset=unset)


def latest_layer_setting(unset: str) -> Any:
    """The setting `tsp_layer`, whose default differs by method."""
    return setting(None, whole(0), "the latest layer after which tokens are dropped", metavar="I", unset=unset)


@dataclass(frozen=True, kw_only=True)
class OnlineTSP(SnapKV):
    """SnapKV's compression, and tokens that are dropped after a layer which a method's `online_selector` finds.

    first_layer, tsp_layer: the layers after which tokens may be dropped at the earliest and at the latest; None means
    the method's own default. tsp_rate: share of the prompt that is propagated, in (0, 1]; 1 turns TSP off. tsp_len: the
    same as an absolute number of tokens; it wins over the rate, and no floor applies to it. The others are SnapKV's.
    Raises FastKVError for a value out of range.
    """

    first_layer: int | None
    tsp_layer: int | None
    tsp_rate: float = setting(
        0.2, number(0, 1, above=True), "share of the prompt that is propagated; 1 turns TSP off", metavar="R"
    )
    tsp_len: int | None = setting(None, whole(1), "tokens that are propagated, in place of --tsp-rate", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def least_budget(self, n_tokens: int) -> int:
        return min(super().least_budget(n_tokens), self.count(self.tsp_len, self.tsp_rate, n_tokens))

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
        if keep >= n_tokens or first + 1 >= n_layers:  # after the last layer there is nothing to save
            return [Stage(range(n_layers))]
        return [Stage(range(latest + 1), keep), Stage(range(latest + 1, n_layers))]
