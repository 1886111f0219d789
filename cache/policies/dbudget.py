"""DBudgetKV: the first tokens and the latest, as many as an attention norm asks for (arXiv 2502.16886)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.compressed import MIN_TOKENS_HELP
from fastkv.cache.policies.scored import KEEP_MASS_MOST_HELP
from fastkv.cache.policy import Observation, Policy
from fastkv.cache.setting import number, setting, whole

if TYPE_CHECKING:
    from torch import Tensor

UNCOUNTED_HELP = "first tokens whose attention is not counted in the norm; 0: the paper's"
WINDOW_HELP = "last tokens, always kept, whose mean attention says how many others stay"


@dataclass(frozen=True, kw_only=True)
class DBudgetKV(Policy):
    """Each KV head drops tokens from the `sinks` on, the earliest first, until its attention would lose too much.

    a is the attention of the prompt's last token to all tokens, summed over the query heads of a KV head. A head keeps
    the first i tokens of the order: the `sinks` first tokens, then from the last one backwards; i is the smallest with
    1 - |a_1 ... a_i| / |a| < drop_norm, by the Euclidean norm. So there is no budget to be set, and the figures of a
    request say what was kept. The attention says how many, never which.

    drop_norm: in [0, 1]; 0 keeps all. uncounted: the first tokens whose part of a is taken for 0. In models that attend
    to the first token almost alone, nothing else would count; of a prompt of no more tokens, nothing does, and
    min_tokens stay. full_layers: the first layers, which keep everything.
    window: a is the mean of so many last tokens, which are always kept. min_tokens: no head keeps fewer.
    keep_mass_most: no head keeps more than this share of the prompt, or than min_tokens. Memory is there before the
    prefill, for keep_mass_most.

    What differs from the paper, of which no code was seen: one decision for each KV head and its group of query heads
    is our reading; so are uncounted, min_tokens and keep_mass_most, which it does not have (0, 1 and 1.0 are the
    paper's). The answer is added to what was kept. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "dbudget"
    per_head = True

    drop_norm: float = setting(
        0.01, number(0, 1), "share of the norm of an attention row that dropped tokens may take away", metavar="R"
    )
    uncounted: int = setting(4, whole(0), UNCOUNTED_HELP, metavar="N")
    full_layers: int = setting(2, whole(0), "first layers, which keep all entries", metavar="N")
    sinks: int = setting(4, whole(0), "first tokens that are always kept", metavar="N")
    window: int = setting(1, whole(1), WINDOW_HELP, metavar="W")
    min_tokens: int = setting(128, whole(1), MIN_TOKENS_HELP, metavar="N")
    keep_mass_most: float = setting(1.0, number(0, 1, above=True), KEEP_MASS_MOST_HELP, metavar="R")

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        if layer < self.full_layers:
            return n_tokens
        return min(n_tokens, max(int(self.keep_mass_most * n_tokens), self._least))

    def least(self, layer: int, n_layers: int, n_tokens: int) -> int:
        if layer < self.full_layers or not self.drop_norm:
            return self.budget(layer, n_layers, n_tokens)
        return min(n_tokens, self._least)

    @property
    def _least(self) -> int:
        return max(self.min_tokens, self.sinks + self.window)

    def counts(self, observed: Observation, n_layers: int, scores: Tensor, least: int, most: int) -> Tensor:
        from fastkv.cache.keep_mass import norm_counts

        attention = observed.attention(self.window).sum(dim=(2, 3))  # [B, Hkv, T]
        return norm_counts(attention, self.sinks, self.drop_norm, self.uncounted).clamp(least, most)

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        import torch

        return torch.full(scores.shape[:2], count, device=scores.device)

    def score(self, observed: Observation) -> Tensor:
        """The order in which tokens are taken: the sinks first, then the later the better."""
        import torch

        batch, n_heads, n_tokens, _ = observed.k.shape
        order = torch.arange(n_tokens - self.window, dtype=torch.float32, device=observed.k.device)
        order[: self.sinks] += n_tokens
        return order.expand(batch, n_heads, -1)
