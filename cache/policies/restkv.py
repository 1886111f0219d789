"""ReST-KV: an entry is worth the error of the attention output without it (arXiv 2605.08840)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.criticalkv import NORM_HELP
from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.setting import choice, no_setting, number, redefined, setting

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation

_TOKENS_AT_A_TIME = 4096  # whose distance from the output of each query head is held
_DRIFT_PER_TOKEN = 2000  # tokens of drift that widen the pooling by one to each side, and shift it by one


@dataclass(frozen=True, kw_only=True)
class ReSTKV(SnapKV):
    """Leaves out one entry after the other, and asks how far the output of the layer's attention moves.

    A query head attends to the tokens as its window does on average, the later a query the more it weighs: a, with the
    output o, the sum of a_t v_t. Without entry t, and with the rest made to sum to one again, the output moves by
    a_t / (1 - a_t) * (o - v_t). The length of this after the output projection is the score, summed over a group.

    alpha: weight of a query against all before it, in (0, 1]; 1 reads the last query alone. norm: CriticalKV's; the
    paper's is l2. pooling: "adaptive", the mean of `kernel` neighbours or of more, moved along the prompt, where the
    two halves of the window look at places that are thousands of tokens apart; or one of SnapKV's. The others are
    SnapKV's, but that queries and values are settled.

    What differs from the paper: its window is 32; the drift is that of each prompt of a batch; it is the distance
    between the mean positions of the entries that either half of the window would keep, which is our reading. Raises
    FastKVError for a value out of range.
    """

    name: ClassVar[str] = "restkv"

    queries: str = setting("mean", choice("mean"), "the mean of these queries, the later the more", metavar="mean")
    pooling: str = setting(
        "adaptive",
        choice("adaptive", "max", "avg", "forward"),
        "max, avg or forward as elsewhere; adaptive: a mean that moves as attention does",
        metavar="adaptive|max|avg|forward",
    )
    kernel: int = redefined(SnapKV, "kernel", 5)
    norm: str = setting("l2", choice("l1", "l2"), NORM_HELP, metavar="l1|l2")
    alpha: float = setting(
        0.3, number(0, 1, above=True), "weight of a query of the window against those before it", metavar="R"
    )
    # The method measures what values add already, and knows no queries but the window's.
    values: bool = no_setting(False)
    lookahead: int = no_setting(0)
    lookahead_reach: int | None = no_setting(None)

    def score(self, observed: Observation) -> Tensor:
        attention = observed.attention(self.window)  # [B, Hkv, G, W, T]
        lost = self._lost(observed, self._mean(attention))
        if self.pooling != "adaptive":
            return self.smoothed(observed, lost, self.reach)
        from fastkv.cache.scores import shifted_mean

        lost[..., : self.sinks] = 0
        drifts = [drift / _DRIFT_PER_TOKEN for drift in self._drifts(observed, attention[..., : -self.window])]
        widths = [max(self.kernel, 2 * int(abs(drift)) + 1) for drift in drifts]
        return self.raised(observed, shifted_mean(lost.sum(dim=2), widths, [int(drift) for drift in drifts]))

    def _mean(self, attention: Tensor) -> Tensor:
        """The moving average over the queries, at the last one: [B, Hkv, G, W, T] -> [B, Hkv, G, T]."""
        import torch

        n_queries = attention.shape[3]
        weights = self.alpha * (1 - self.alpha) ** torch.arange(n_queries - 1, -1, -1.0, device=attention.device)
        weights[0] /= self.alpha  # the first is the average that it began with
        return torch.einsum("bhgwt,w->bhgt", attention, weights)

    def _lost(self, observed: Observation, mean: Tensor) -> Tensor:
        """How far the output moves without each entry before the window: float32 [B, Hkv, G, T - W]."""
        import torch

        values = observed.v.float()
        output = (mean @ values).unsqueeze(3)  # [B, Hkv, G, 1, D]
        before = values[:, :, : -self.window].split(_TOKENS_AT_A_TIME, dim=2)
        away = [observed.output_norms(output - part.unsqueeze(2), self.norm) for part in before]
        share = mean[..., : -self.window]
        return share / (1 - share).clamp_min(1e-6) * torch.cat(away, dim=-1)

    def _drifts(self, observed: Observation, attention: Tensor) -> list[float]:
        """For each prompt, by how many tokens the later half of the window looks further on than the earlier one."""
        n_queries, n_before = attention.shape[3:]
        keep = self.fewest(n_before + self.window) - self.window
        if n_queries < 2 or keep < 1:
            return [0.0] * attention.shape[0]
        halves = attention.split((n_queries // 2, n_queries - n_queries // 2), dim=3)
        best = [half.sum(dim=(2, 3)).topk(keep, dim=-1).indices.float() for half in halves]
        places = [observed.all_heads(of_half).mean(dim=(1, 2)) for of_half in best]
        drifts: list[float] = (places[1] - places[0]).tolist()
        return drifts
