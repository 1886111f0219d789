"""How the importance of tokens settles with depth: what each layer would choose, held against what later layers read.

For a prompt, a full-context prefill gives every layer's TSP scores (arXiv 2502.01068). At a rate r, layer l's choice
are the int(r·N) tokens that TSP at layer l would propagate. The last W tokens, which choose (FastKV's tsp_window),
count on neither side. Knows nothing of answers: whether a choice is good enough is for check.py to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkv.cache.policies import FastKV
from fastkv.cache.policy import Observation, Policy
from fastkv.cache.selection import select_tokens
from fastkv.engine.llm import LLM
from fastkv.errors import FastKVError

_NOTHING = 1e-6  # shares of attention are sums of float32: what is smaller is rounding


@dataclass(frozen=True)
class Importance:
    """Of one prompt, or the mean of several; float64, over R rates and L layers.

    overlap: [R, L, L], the share of layer l's choice that layer m would choose too.
    coverage: [R, L, L], the share of layer m's scores that falls on layer l's choice.
    attained: [R, L - 1], how much of what could be covered of the layers after l its choice does cover, between as
    many tokens at random (0; worse than that is negative) and those layers' own choices (1).
    """

    rates: tuple[float, ...]
    overlap: Tensor
    coverage: Tensor
    attained: Tensor


class Recorder(Policy):
    """Full context in every layer, and for each of `counts` what TSP at each layer would propagate by `scorer`.

    counts: of propagated tokens, those included that choose. `scores` and `chosen` are of the tokens in front of these.
    A prefill attends to all K and V, whatever the cache keeps of them. So the smallest budget is asked for: it makes
    every layer score, changes nothing that is computed, and costs no memory.
    """

    name: ClassVar[str] = FastKV.name  # whose choices these are: what refuses FastKV a prompt refuses this one

    def __init__(self, scorer: FastKV, counts: Sequence[int] = ()) -> None:
        self._scorer, self._counts = scorer, counts
        self.window = scorer.window
        self._scores: list[list[Tensor]] = [[] for _ in counts]
        self._chosen: list[list[Tensor]] = [[] for _ in counts]

    @property
    def n_queries(self) -> int:
        return self._scorer.n_queries

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return self.window

    def score(self, observed: Observation) -> Tensor:
        scores = self._scorer.score(observed)
        for index, count in enumerate(self._counts):
            n_choosing = self._scorer.window_of_tsp(observed, count)
            of_layer = self._scorer.tsp_scores(observed, scores, n_choosing)[0].sum(dim=0).cpu()
            # The engine's own choice, ties included; its last indices are the tokens that choose.
            best = select_tokens(self._scorer.importance(observed, scores, count), count, self.window)[0, :-n_choosing]
            self._scores[index].append(of_layer)
            self._chosen[index].append(torch.zeros(len(of_layer), dtype=torch.float64).index_fill_(0, best.cpu(), 1))
        return scores

    @property
    def scores(self) -> list[Tensor]:
        """For each count float32 [L, n], summed over KV heads."""
        return [torch.stack(layers) for layers in self._scores]

    @property
    def chosen(self) -> list[Tensor]:
        """For each count float64 zeros and ones [L, n]."""
        return [torch.stack(layers) for layers in self._chosen]


def measure(llm: LLM, ids: list[int], scorer: FastKV, rates: Sequence[float]) -> Importance:
    """Prefill a prompt and compare the layers. Raises FastKVError where a rate leaves no token beyond the window."""
    smallest = min(rates)
    if int(smallest * len(ids)) <= scorer.window:
        raise FastKVError(
            f"a prompt of {len(ids)} tokens is too short: at a rate of {smallest:g} nothing but the window of "
            f"{scorer.window} would be propagated; give longer prompts, or higher rates with --tsp-rate"
        )
    recorder = Recorder(scorer, [int(rate * len(ids)) for rate in rates])
    llm.prefill(ids, recorder, max_tokens=0)
    return compare(recorder.scores, recorder.chosen, rates)


def compare(scores: Sequence[Tensor], chosen: Sequence[Tensor], rates: Sequence[float]) -> Importance:
    """Of one prompt for each rate scores float32 [L, n] and choices float64 [L, n]: see Recorder."""
    at_rates = (_at_one_rate(scored.double(), choice) for scored, choice in zip(scores, chosen, strict=True))
    return Importance(tuple(rates), *map(torch.stack, zip(*at_rates, strict=True)))


def mean(parts: Sequence[Importance]) -> Importance:
    """The mean over prompts, each counting the same."""
    tensors = zip(*((part.overlap, part.coverage, part.attained) for part in parts), strict=True)
    return Importance(parts[0].rates, *(torch.stack(over_prompts).mean(dim=0) for over_prompts in tensors))


def _at_one_rate(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap and coverage [L, L], attained [L - 1], of float64 scores and choices [L, N - W]."""
    overlap = chosen @ chosen.T / chosen[0].sum()
    coverage = chosen @ (scores / scores.sum(dim=1, keepdim=True)).T
    at_random = chosen[0].mean()
    gained, possible = coverage - at_random, coverage.diag() - at_random
    attained = torch.ones(len(scores) - 1, dtype=torch.float64)  # scores that are all alike leave nothing to miss
    for layer in range(len(scores) - 1):
        to_gain = possible[layer + 1 :].sum()
        if to_gain > _NOTHING:
            attained[layer] = gained[layer, layer + 1 :].sum() / to_gain
    return overlap, coverage, attained
