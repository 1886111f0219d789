"""Context reduction (TSP) as an option of policies that choose entries: at one layer, by the very same scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.policy import Stage
from fastkv.cache.setting import number, setting, whole
from fastkv.errors import FastKVError

TSP_LAYER_HELP = "layer after whose attention tokens are dropped, with --tsp-rate below 1"
TSP_RATE_HELP = "share of the prompt that is propagated after it, by the same scores; 1: no TSP"


@dataclass(frozen=True, kw_only=True)
class OptionalTSP(Compressed):
    """A compressed cache, and TSP as in FastKV where that is asked for.

    tsp_rate: below 1, this share of the prompt is propagated after `tsp_layer` (None: half way up), the tokens with the
    best sum over the KV heads of the scores that choose the entries.
    """

    tsp_layer: int | None = setting(None, whole(0), TSP_LAYER_HELP, metavar="I", unset="half way up")
    tsp_rate: float = setting(1.0, number(0, 1, above=True), TSP_RATE_HELP, metavar="R")

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        if self.tsp_layer is not None and self.tsp_layer >= n_layers:
            raise FastKVError(
                f"tsp_layer must be below the model's number of layers ({n_layers}), not {self.tsp_layer}",
                setting="tsp_layer",
            )

    def settings(self, n_layers: int) -> dict[str, Any]:
        return super().settings(n_layers) | {"tsp_layer": self._tsp_layer_of(n_layers)}

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        keep, layer = self.count(None, self.tsp_rate, n_tokens), self._tsp_layer_of(n_layers)
        if keep >= n_tokens or layer + 1 >= n_layers:
            return super().stages(n_layers, n_tokens)
        return [Stage(range(layer + 1), keep), Stage(range(layer + 1, n_layers))]

    def _tsp_layer_of(self, n_layers: int) -> int:
        return max(0, n_layers // 2 - 1) if self.tsp_layer is None else self.tsp_layer
