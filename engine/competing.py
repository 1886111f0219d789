"""Layers that compete: a policy gives out the budgets of the whole model once the last layer has been scored.

Until then K and V of every token stay in memory, in all layers (RequestPlan.held_nbytes counts them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from fastkv.cache.policy import Observation, Policy
from fastkv.cache.selection import PerHead, select_each


class CompetingLayers:
    """What the layers of one prefill saw and scored: `hold` for each of them, then `chosen`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._counts: list[int] = []
        self._held: list[tuple[Observation, Tensor, Tensor]] = []

    def hold(self, observed: Observation, scores: Tensor, positions: Tensor, count: int) -> None:
        """Copy K, V and queries of a layer, whose mean budget is `count`. positions: int64 [B, Hkv, T]."""
        n_queries = self._policy.n_queries
        k, v, q = observed.k.clone(), observed.v.clone(), observed.q[:, :, -n_queries:].clone()
        self._held.append((replace(observed, q=q, k=k, v=v), scores, positions))
        self._counts.append(count)

    def chosen(self) -> Iterator[tuple[Observation, list[PerHead], Tensor]]:
        """What each layer saw, what each sequence keeps of it, and its positions.

        A layer's memory goes after its turn.
        """
        if not self._held:  # a prompt that is kept whole
            return
        budgets = self._policy.model_budgets(self._counts, [scores for _, scores, _ in self._held])
        for counts in budgets:
            observed, scores, positions = self._held.pop(0)
            ranking = self._policy.ranking(observed, scores, counts)
            yield observed, select_each(ranking, counts, self._policy.window), positions
