"""DefensiveKV's layer variant: the heads of all layers compete for the whole cache (arXiv 2510.13334)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.defensivekv import DefensiveKV
from fastkv.cache.setting import no_setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DefensiveKVLayer(DefensiveKV):
    """DefensiveKV, but the best entries of the whole model win, and not those of each layer.

    kv_retention, kv_len, min_tokens: the MEAN budget of all heads of the model. head_floor: share of it that each head
    has for certain. The settings are DefensiveKV's. K and V of all tokens stay in memory until the last layer has been
    scored. What differs from the paper stands in DefensiveKV. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "defensivekv-layer"
    over_layers = True

    # All layers share one budget.
    keep_mass: float | None = no_setting(None)
    keep_mass_by: str = no_setting("layer")
    keep_mass_most: float = no_setting(1.0)

    def model_budgets(self, counts: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        from fastkv.cache.selection import competed_counts_of_layers

        # A prefill without context reduction: every layer sees all tokens, and has the same budget.
        return competed_counts_of_layers(scores, counts[0], self.window, self.head_floor)
