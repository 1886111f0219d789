"""PyramidKV: SnapKV with budgets that fall from layer to layer, at the same mean (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policies.snapkv import SnapKV

_STEEPNESS = 20  # the last layer has a twentieth of the mean: the paper's beta


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Lower layers attend widely and keep more, higher ones less; the scores and their settings are SnapKV's.

    kv_retention, kv_len, min_tokens: the MEAN budget b of a layer. Without its window, the last layer keeps a 20th of
    the mean, the first one twice the mean less that, the others lie on the straight line between, and together they
    keep exactly n_layers * b.

    What differs from the paper: what differs in SnapKV, and the rounding, which makes the total exact. A layer keeps no
    more than it saw; what it then does not use is not given to other layers. Raises FastKVError for a value out of
    range.
    """

    name: ClassVar[str] = "pyramidkv"
    scores_on_host: ClassVar[bool] = True

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        mean = super().budget(layer, n_layers, n_tokens)
        if mean <= self.window or mean >= n_tokens:
            return mean
        return self.window + _spread(mean - self.window, n_layers)[layer]


def _spread(mean: int, n_layers: int) -> list[int]:
    """Whole numbers on a falling line with that mean: each end of a partial sum is rounded, so that none is lost."""
    last = mean / _STEEPNESS
    first = 2 * mean - last
    step = (first - last) / max(1, n_layers - 1)
    exact = [first - step * layer for layer in range(n_layers)] if n_layers > 1 else [float(mean)]
    ends = [round(sum(exact[: layer + 1])) for layer in range(n_layers)]
    return [end - before for before, end in zip([0, *ends[:-1]], ends, strict=True)]
