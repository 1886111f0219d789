"""DefensiveKV: the query that needs an entry most says what it is worth, not the mean query (arXiv 2510.13334)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.adakv import AdaKV
from fastkv.cache.policies.criticalkv import NORM_HELP
from fastkv.cache.setting import choice, no_setting, number, redefined, setting

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv.cache.policy import Observation


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(AdaKV):
    """The most that any query of the window and of the group attends, at least the mean, times output norms.

    First each KV head takes its best entries by mean attention, until these and the window hold `certain_mass` of that
    attention or its mean budget is used up. What is left of the layer's budget goes to the best scores of all heads, as
    in AdaKV. A score is the attention of each query, pooled ("avg" keeps the sum that it had), of which the highest
    counts (queries), or the mean over the tokens where that is higher; times the output norm (see CriticalKV) as a
    share of the sum over the layer's KV heads.

    norm: CriticalKV's. certain_mass: in [0, 1]. head_floor and the others are AdaKV's; values multiplies the attention.

    What differs from the paper: its window is 32; the window's mass is that of each head, where its code has the mean
    of a layer, taken from tokens before the window; a query head's group competes as its KV head. Raises FastKVError
    for a value out of range.
    """

    name: ClassVar[str] = "defensivekv"

    queries: str = redefined(AdaKV, "queries", "max")
    pooling: str = redefined(AdaKV, "pooling", "avg")
    kernel: int = redefined(AdaKV, "kernel", 5)
    norm: str = setting("l1", choice("l1", "l2"), NORM_HELP, metavar="l1|l2")
    certain_mass: float = setting(
        0.9, number(0, 1), "share of a head's attention whose tokens are kept before others compete", metavar="R"
    )
    # The method knows no queries but the window's.
    lookahead: int = no_setting(0)
    lookahead_reach: int | None = no_setting(None)

    def score(self, observed: Observation) -> Tensor:
        import torch

        from fastkv.cache.scores import over_queries

        attention = observed.attention(self.window)  # [B, Hkv, G, W, T]
        before = attention[..., : -self.window]
        highest = over_queries(self._rows(observed, before), self.queries).amax(dim=2)  # [B, Hkv, T - W]
        risk = highest.clamp_min(highest.mean(dim=-1, keepdim=True))
        norms = observed.output_norms(observed.v[:, :, : -self.window], self.norm).mean(dim=2)
        share = norms / observed.all_heads(norms).sum(dim=1, keepdim=True)
        scores = self.raised(observed, risk * share)
        return torch.where(self._certain(before.mean(dim=(2, 3))), observed.highest(scores) + 1, scores)

    def _rows(self, observed: Observation, attention: Tensor) -> Tensor:
        """The attention of each query, pooled: [B, Hkv, G, W, n] -> the same shape."""
        from fastkv.cache.scores import value_norms

        if self.values:
            attention = attention * value_norms(observed.v[:, :, : -self.window])[:, :, None, None]
        rows = self.pooled(attention, self.reach)
        if self.pooling != "avg":
            return rows
        mass = attention[..., self.sinks :].sum(dim=-1, keepdim=True)
        return rows * (mass / rows.sum(dim=-1, keepdim=True).clamp_min(1e-30))

    def _certain(self, mean: Tensor) -> Tensor:
        """Which entries are kept whatever they score, the sinks among them: bool [B, Hkv, n], from mean attention."""
        from fastkv.cache.scores import ranks

        n_tokens = mean.shape[-1] + self.window
        most = self.most(n_tokens) - self.window
        of_window = 1 - mean.sum(dim=-1, keepdim=True)
        held = of_window + mean.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        count = (held < self.certain_mass).sum(dim=-1, keepdim=True).clamp(min(self.sinks, most), most)
        mean[..., : self.sinks] = float("inf")
        return ranks(mean) < count
