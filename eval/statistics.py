"""95 % confidence intervals, with nothing beyond the standard library.

A mean of scores that are all 0 or 1 gets Wilson's score interval, a paired difference of such scores Tango's
(Statistics in Medicine 17, 1998, 891-908). Other scores get Student's t; where they have no spread at all, which t
takes for certainty, the interval is that of 0/1 scores, which is never too narrow for numbers between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_NORMAL_FROM = 1000  # degrees of freedom from which Student's t is as good as normal


@dataclass(frozen=True)
class Estimate:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_estimate(scores: Sequence[float]) -> Estimate:
    """The mean of scores in [0, 1], at least one of them."""
    mean = fmean(scores)
    if _binary(scores) or len(set(scores)) == 1:
        return Estimate(mean, *wilson(sum(scores), len(scores)))
    return _by_student(scores, 0.0)


def paired_estimate(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean of scores minus baseline, both in [0, 1] and of the same examples in the same order."""
    differences = [score - base for score, base in zip(scores, baseline, strict=True)]
    mean = fmean(differences)
    if _binary(scores) and _binary(baseline):
        return Estimate(mean, *tango(differences.count(1), differences.count(-1), len(differences)))
    if len(set(differences)) == 1:
        n = len(differences)
        return Estimate(mean, *tango(n * max(mean, 0.0), n * max(-mean, 0.0), n))
    return _by_student(differences, -1.0)


def mean_of_means(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, each counting the same; its bounds by squares (MOVER).

    Zou and Donner, Statistics in Medicine 27, 2008, 1693-1702.
    """
    if len(parts) == 1:
        return parts[0]
    mean = fmean(part.mean for part in parts)
    below = math.hypot(*(part.mean - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.mean for part in parts)) / len(parts)
    return Estimate(mean, mean - below, mean + above)


def wilson(successes: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends, where rounding would leave a little.
    return (0.0 if successes == 0 else max(centre - half, 0.0)), (1.0 if successes == n else min(centre + half, 1.0))


def tango(gained: float, lost: float, n: int, z: float = Z) -> tuple[float, float]:
    """Tango's score interval of (gained - lost) / n, for n pairs of which so many are right on one side alone."""
    observed = (gained - lost) / n

    def score(delta: float) -> float:
        """How many standard errors the observed difference lies above a true difference `delta`."""
        b = 2 * n * delta - (gained + lost) - (gained - lost) * delta
        # The likeliest share of lost pairs, were delta true.
        share = (math.sqrt(max(b * b + 8 * n * lost * delta * (1 - delta), 0.0)) - b) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        distance = n * (observed - delta)
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    low = -1.0 if observed == -1 else _falling_root(lambda delta: score(delta) - z, -1.0, observed)
    high = 1.0 if observed == 1 else _falling_root(lambda delta: score(delta) + z, observed, 1.0)
    return low, high


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t beyond which a share (1 - confidence) of Student's distribution lies, both sides together."""
    if degrees >= _NORMAL_FROM:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    angle = _falling_root(lambda theta: confidence - _share_within(theta, degrees), 0.0, math.pi / 2)
    return math.sqrt(degrees) * math.tan(angle)


def _share_within(theta: float, degrees: int) -> float:
    """P(|t| <= √degrees · tan θ): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _falling_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between two numbers."""
    for _ in range(100):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _by_student(values: Sequence[float], lowest: float) -> Estimate:
    mean, half = fmean(values), student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, max(mean - half, lowest), min(mean + half, 1.0))


def _binary(values: Sequence[float]) -> bool:
    return set(values) <= {0.0, 1.0}
