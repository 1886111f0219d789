"""The search: first a TSP layer and rate that lose nothing, then the smallest KV retention and the reach for it.

A setting that fails is given up at the needle that is one too many, and the needles that were lost most often come
first: so failing is cheap, and only what passes costs a run over all needles. That a smaller retention loses no fewer
needles is taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from fastkv.cache.policies import FastKV
from fastkv.engine.cost import prefill_share
from fastkv.models.config import ModelConfig

N = TypeVar("N")

RETENTIONS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
REACHES = (10, 14, 28, 40)  # besides the default
RATES = (0.1, 0.2, 0.4)
LAYERS = (0.25, 0.375, 0.5, 0.625)  # of the layers, after which share of them tokens are dropped


@dataclass(frozen=True)
class Tried:
    """A setting that was run: over how many needles, and how many of them it lost."""

    policy: FastKV
    run: int
    lost: int


@dataclass
class Trial(Generic[N]):
    """Runs settings over needles, all of which the full cache finds.

    finds: whether a policy finds a needle. show: is told the policy, the needles done, and the needles in all.
    """

    needles: Sequence[N]
    finds: Callable[[N, FastKV], bool]
    show: Callable[[FastKV, int, int], None]
    tried: list[Tried] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lost_before = [0] * len(self.needles)

    def passes(self, policy: FastKV, most: int) -> bool:
        """Whether `policy` loses no more than `most` needles."""
        lost = run = 0
        for index in sorted(range(len(self.needles)), key=lambda index: (-self._lost_before[index], index)):
            self.show(policy, run, len(self.needles))
            run += 1
            if not self.finds(self.needles[index], policy):
                self._lost_before[index] += 1
                lost += 1
                if lost > most:
                    break
        self.tried.append(Tried(policy, run, lost))
        return lost <= most


def tsp_settings(base: FastKV, config: ModelConfig, length: int) -> list[FastKV]:
    """TSP layers and rates worth trying on prompts of `length` tokens, those of the least work first; last of all off.

    They keep the whole KV, so that what is lost is lost by TSP.
    """
    n_layers = config.n_layers
    layers = sorted({max(0, int(share * n_layers) - 1) for share in LAYERS} | {max(0, n_layers // 2 - 1)})
    whole = replace(base, kv_retention=1.0)
    found = [
        replace(whole, tsp_layer=layer, tsp_rate=rate) for layer in layers if layer < n_layers - 1 for rate in RATES
    ]
    found.sort(key=lambda policy: prefill_share(config, policy, [length]))
    return [*found, replace(whole, tsp_rate=1.0)]


def search(trial: Trial[N], base: FastKV, tsp: Sequence[FastKV], most: int) -> FastKV:
    """The setting with the smallest retention that loses at most `most` needles of the trial."""
    *candidates, off = tsp
    best = next((policy for policy in candidates if trial.passes(policy, 0)), off)
    steps = [replace(best, kv_retention=retention) for retention in RETENTIONS]
    passed, failed = -1, len(steps)  # the last that passes, the first that fails
    while failed - passed > 1:
        middle = (passed + failed) // 2
        if trial.passes(steps[middle], most):
            passed = middle
        else:
            failed = middle
    best = steps[passed] if passed >= 0 else best
    for reach in REACHES:
        while passed + 1 < len(RETENTIONS):
            policy = replace(best, reach=reach, kv_retention=RETENTIONS[passed + 1])
            if not trial.passes(policy, most):
                break
            best, passed = policy, passed + 1
    return best
