"""What policies share that know no question: their budgets, by heads or over the model, and the ends that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkv.cache.policies.adakv import FLOOR_HELP
from fastkv.cache.policies.optional_tsp import OptionalTSP
from fastkv.cache.policies.scored import Scored
from fastkv.cache.setting import choice, number, setting, whole
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation

BUDGETS_HELP = "even: each KV head keeps as many entries; heads: those of a layer compete; model: those of all layers"


@dataclass(frozen=True, kw_only=True)
class QueryAgnostic(Scored, OptionalTSP):
    """Compressed by scores that look at no question, so that the cache serves whatever is asked of it later.

    budgets: "even"; "heads": the best entries of a layer win, each KV head having `head_floor` of the budget for
    certain (AdaKV); "model": the best of all layers win, and K and V of all tokens stay in memory until the last layer
    has been scored. sinks, window: the first and the last tokens, always kept; a budget has room for both.
    tsp_rate, tsp_layer: OptionalTSP's. Not where layers compete, which must see the same tokens.
    """

    budgets: str = setting("even", choice("even", "heads", "model"), BUDGETS_HELP, metavar="even|heads|model")
    head_floor: float = setting(0.2, number(0, 1), FLOOR_HELP, metavar="R")
    sinks: int = setting(4, whole(0), "first tokens that are always kept", metavar="N")
    window: int = setting(4, whole(1), "last tokens, always kept", metavar="W")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over_layers and self.tsp_rate < 1:
            raise FastKVError(
                "tsp_rate below 1 does not go with budgets of the whole model, whose layers must see the same tokens: "
                "take budgets even or heads",
                setting="tsp_rate",
            )

    @property
    def heads_compete(self) -> bool:
        return self.budgets != "even"

    @property
    def per_head(self) -> bool:
        return self.heads_compete or super().per_head

    @property
    def over_layers(self) -> bool:
        return self.budgets == "model"

    def check_holds_window(self, name: str, value: int | None) -> None:
        ends = self.sinks + self.window
        if value is not None and value < ends:
            raise FastKVError(
                f"{name} must be at least sinks and window together ({ends}), which are always kept, not {value}",
                setting=name,
            )

    def count(self, length: int | None, rate: float, n_tokens: int) -> int:
        return max(super().count(length, rate, n_tokens), min(self.sinks + self.window, n_tokens))

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        if not self.heads_compete:
            return super().head_budgets(layer, n_layers, count, scores)
        return self.layer_budgets(count, scores, self.head_floor)

    def mass(self, observed: Observation, scores: Tensor) -> Tensor:
        """As elsewhere, of the entries between the ends; the sinks, which are always kept, weigh nothing."""
        from torch.nn.functional import pad

        return pad(super().mass(observed, scores[..., self.sinks :]), (self.sinks, 0))

    def layer_budgets(self, count: int, scores: Tensor, floor: float) -> Tensor:
        """Of a layer whose heads compete for `count` entries each on average, with this floor: int64 [B, Hkv]."""
        from fastkv.cache.selection import competed_counts

        return competed_counts(scores, count, self.window, floor)

    def model_budgets(self, counts: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        from fastkv.cache.selection import competed_counts_of_layers

        return competed_counts_of_layers(scores, counts[0], self.window, self.head_floor)

    def score(self, observed: Observation) -> Tensor:
        import torch

        between = self.between(observed)
        # Above any score of any layer: layers may compete.
        return torch.nn.functional.pad(between, (self.sinks, 0), value=torch.finfo(between.dtype).max)

    def between(self, observed: Observation) -> Tensor:
        """float32 [B, Hkv, n_past + T - sinks - window]: how much each entry between the ends matters."""
        raise NotImplementedError
