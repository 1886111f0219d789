"""CriticalKV: half of the entries by attention, half by what their values add to the output (arXiv 2502.03805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.setting import choice, setting

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation

NORM_HELP = "length of a value after the output projection: l1 costs as much as that, l2 little"
_LEAST_SCORE = 1e-4  # added, so that a value tells where nothing attends: the paper's


@dataclass(frozen=True, kw_only=True)
class CriticalKV(SnapKV):
    """SnapKV's scores choose half of the budget without the window; the rest, scores times output norms.

    The output norm of an entry is the length of its value after the output projection, the mean over the query heads
    that read it. norm: "l1", as published, which costs a prefill what one more output projection in every layer would;
    or "l2", for which the projection is not computed. The others are SnapKV's.

    What differs from the paper: what differs in SnapKV; and "l2" is ours. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "criticalkv"

    norm: str = setting("l1", choice("l1", "l2"), NORM_HELP, metavar="l1|l2")

    def ranking(self, observed: Observation, scores: Tensor, counts: Tensor | int) -> Tensor:
        from fastkv.cache.scores import best

        chosen = best(scores, (counts - self.window) // 2)
        chosen[..., : self.sinks] = True
        if "norms" not in observed.noted:
            norms = observed.output_norms(observed.v[:, :, : scores.shape[-1]], self.norm)
            observed.noted["norms"] = norms.mean(dim=2)
        return ((scores + _LEAST_SCORE) * observed.noted["norms"]).masked_fill(chosen, float("inf"))
