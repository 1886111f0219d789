"""What a training run is: its settings, its stages, its learning rate. Pure arithmetic, no tensors.

`progress` is the share of the run that is over, 0 to 1; the clock or the step counter drives it (training_loop.py).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

HEAD_DIM = 32
MIN_LENGTH, MAX_LENGTH = 64, 8192
LENGTHS = (128, 256, 512, 1024, 2048, 4096)

# Shares of the run. Lengths beyond LONGEST_ALONE come up in the mix only.
LONGEST_ALONE = 1024
FIRST_SHARE, GROWTH_SHARE, MIX_SHARE, HIDING_SHARE = 0.15, 0.35, 0.2, 0.3
RETRIEVAL = 0.5  # share of codes right at which the first stage has done its work

WARM_UP_STEPS = 200
WARM_UP_SHARE = 0.05  # a short run does not spend itself on warming up


@dataclass(frozen=True)
class Settings:
    """What a run keeps from start to end, over every resume.

    `digits`: the fewest and the most of a code. `batch_tokens` are tokens a step. `report_every` is in steps, and is
    also how often accuracy is measured.
    """

    seed: int = 0
    hidden: int = 128
    layers: int = 8
    lengths: tuple[int, ...] = LENGTHS
    digits: tuple[int, int] = (4, 4)
    batch_tokens: int = 8192
    lr: float = 1.5e-3
    report_every: int = 25

    @property
    def n_heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads // 2 if self.n_heads % 2 == 0 else 1

    @property
    def intermediate(self) -> int:
        return 3 * self.hidden


@dataclass(frozen=True)
class Budget:
    """How long a run is: in minutes, in steps, or whichever of the two is over first."""

    minutes: float | None
    steps: int | None

    def progress(self, minutes: float, steps: int) -> float:
        """The share that is over, 0 to 1."""
        shares = [minutes / self.minutes if self.minutes else 0.0, steps / self.steps if self.steps else 0.0]
        return min(1.0, max(shares))


@dataclass(frozen=True)
class Stage:
    """A part of the run: the lengths that its steps draw from, and whether layer 0's far tokens are hidden."""

    lengths: tuple[int, ...]
    share: float
    hiding: bool = False

    def draw_length(self, rng: random.Random) -> int:
        """A length of this stage; the longer, the oftener."""
        return rng.choices(self.lengths, weights=range(1, len(self.lengths) + 1))[0]


def plan(lengths: tuple[int, ...]) -> list[Stage]:
    """The stages for ascending `lengths`: each short one alone, then a mix of all, then the mix with hiding."""
    alone = [length for length in lengths if length <= LONGEST_ALONE] or [lengths[0]]
    weights = range(2, len(alone) + 1)  # a longer length needs more time
    growth = [Stage((n,), GROWTH_SHARE * w / sum(weights)) for n, w in zip(alone[1:], weights, strict=True)]
    return [Stage((alone[0],), FIRST_SHARE), *growth, Stage(lengths, MIX_SHARE), Stage(lengths, HIDING_SHARE, True)]


def stage_at(stages: list[Stage], progress: float, retrieval_at: float | None) -> Stage:
    """The stage at `progress`. The first one ends at `retrieval_at`, where known, and the rest share what remains."""
    first, *rest = stages
    first_end = first.share if retrieval_at is None else min(retrieval_at, first.share)
    if progress < first_end:
        return first
    left = (progress - first_end) / (1 - first_end) * sum(stage.share for stage in rest)
    for stage in rest:
        left -= stage.share
        if left < 0:
            return stage
    return rest[-1]


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Cosine from `peak` to nothing over the run, after a linear warm-up of 200 steps (or 5 % of a short run)."""
    warm = max((step + 1) / WARM_UP_STEPS, progress / WARM_UP_SHARE)
    return peak * min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * progress))
