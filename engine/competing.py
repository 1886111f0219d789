"""Layers that compete: a policy gives out the budgets of the whole model once the last layer has been scored.

Until then K and V of every token stay in memory, in all layers (RequestPlan.held_nbytes counts them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastkv.cache.policy import Observation, Policy
from fastkv.cache.selection import PerHead, select_each


@dataclass
class HeldLayer:
    """What a layer saw, at `positions` int64 [B, Hkv, T], and its scores once they are known.

    k, v: [B, Hkv, T + room, D], of which `observed` has the first T.
    """

    observed: Observation
    positions: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor | None = None


class CompetingLayers:
    """What the layers of one prefill saw and scored: `hold` for each of them, then `chosen`.

    room: for tokens after those of a layer, while the model repeats the prompt (engine/probe.py).
    """

    def __init__(self, policy: Policy, room: int = 0) -> None:
        self._policy, self._room = policy, room
        self._counts: list[int] = []
        self._held: list[HeldLayer] = []

    @property
    def layers(self) -> Sequence[HeldLayer]:
        """Those that are held, first to last."""
        return self._held

    def hold(self, observed: Observation, positions: Tensor, count: int, scores: Tensor | None) -> None:
        """Copy K, V and queries of a layer, whose mean budget is `count`. scores: None where `score` gives them."""
        q = observed.q[:, :, -self._policy.n_queries :].clone()
        (k, seen_k), (v, seen_v) = self._copied(observed.k), self._copied(observed.v)
        self._held.append(HeldLayer(replace(observed, q=q, k=seen_k, v=seen_v), positions, k, v, scores))
        self._counts.append(count)

    def score(self, score: Callable[[Observation], Tensor], probed: Sequence[Tensor]) -> None:
        """Score all layers by what a probe has shown of each, float32 [B, Hkv, T]."""
        for held, of_layer in zip(self._held, probed, strict=True):
            held.scores = score(replace(held.observed, probed=of_layer))

    def chosen(self) -> Iterator[tuple[Observation, list[PerHead], Tensor]]:
        """What each layer saw, what each sequence keeps of it, and its positions.

        A layer's memory goes after its turn.
        """
        if not self._held:  # a prompt that is kept whole
            return
        scores = [held.observed.all_heads(_known(held.scores)) for held in self._held]
        budgets = self._policy.model_budgets(self._counts, scores)
        for of_all_heads in budgets:
            held = self._held.pop(0)
            counts = held.observed.own_heads(of_all_heads)
            ranking = self._policy.ranking(held.observed, _known(held.scores), counts)
            yield held.observed, select_each(ranking, counts, self._policy.window), held.positions

    def _copied(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of [B, H, T, D] with room after it, and the part that is a copy."""
        batch, n_heads, n_tokens, head_dim = entries.shape
        memory = entries.new_empty(batch, n_heads, n_tokens + self._room, head_dim)
        memory[:, :, :n_tokens] = entries
        return memory, memory[:, :, :n_tokens]


def _known(scores: Tensor | None) -> Tensor:
    assert scores is not None, "layers are scored before they compete"
    return scores
