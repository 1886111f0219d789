"""TOVA: every KV head keeps the same entries, those that the last token attends to (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.setting import redefined

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation


@dataclass(frozen=True, kw_only=True)
class TOVA(WindowScored):
    """The attention of the last query, averaged over all heads of the layer; nothing is pooled.

    kv_retention, kv_len, min_tokens: the budget of a layer. The scores' settings are SnapKV's, with the paper's
    defaults: a window of the last token alone, and a kernel of 1, which leaves the scores as they are.

    What differs from the paper: it compresses the prompt once, and the answer is added to what was kept; the original
    also drops the weakest entry at every step while it writes. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "tova"
    compresses_again: ClassVar[bool] = True
    scores_on_host: ClassVar[bool] = True

    window: int = redefined(WindowScored, "window", 1)
    kernel: int = redefined(WindowScored, "kernel", 1)

    def score(self, observed: Observation) -> Tensor:
        scores = super().score(observed)
        return observed.all_heads(scores).mean(dim=1, keepdim=True).expand_as(scores)

    def mass(self, observed: Observation, scores: Tensor) -> Tensor:
        mass = super().mass(observed, scores)
        return observed.all_heads(mass).mean(dim=1, keepdim=True).expand_as(mass)
