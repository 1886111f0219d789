"""Scoring rules, and confidence intervals against published values."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from fastkv.eval.example import Example, contains_all, contains_any, first_word
from fastkv.eval.statistics import Estimate, mean_estimate, mean_of_means, paired_estimate, student_t, tango, wilson


@pytest.mark.parametrize(
    ("rule", "prediction", "answers", "score"),
    [
        (contains_all, " 1234567, and 7654321.", ("1234567", "7654321"), 1.0),
        (contains_all, " 1234567.", ("1234567", "7654321"), 0.5),
        (contains_all, "the AMBER heron", ("Amber Heron",), 1.0),
        (contains_all, "", ("x",), 0.0),
        (contains_any, "it was ada lovelace", ("Babbage", "Lovelace"), 1.0),
        (contains_any, "it was Turing", ("Babbage", "Lovelace"), 0.0),
        (first_word, " 1395.\n", ("1395",), 1.0),
        (first_word, " 1395", ("1395",), 1.0),
        (first_word, " 13950.", ("1395",), 0.0),
        (first_word, " The 1395.", ("1395",), 0.0),
        (first_word, "", ("1395",), 0.0),
        (first_word, " \n ", ("",), 0.0),
    ],
)
def test_rules(rule: Callable[[str, Example], float], prediction: str, answers: tuple[str, ...], score: float) -> None:
    assert rule(prediction, Example("", answers)) == score


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_tango_as_published() -> None:
    """Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): one child better, seven worse, of 21.

    And PropCIs::scoreci.mp(25, 28, 618, conf.level = 0.9) of R, whose differences have the other sign.
    """
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert tango(28, 25, 618, z=1.6448536) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


def test_tango_at_the_ends() -> None:
    """No pair that differs leaves room for some that would: z²/(n + z²)."""
    assert tango(0, 0, 50) == pytest.approx((-0.07135, 0.07135), abs=1e-5)
    low, high = tango(50, 0, 50)
    assert (high, tango(0, 50, 50)) == (1.0, (-1.0, pytest.approx(-low)))
    assert 0.8 < low < 1


@pytest.mark.parametrize(
    ("degrees", "t"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (10, 2.228),
        (30, 2.042),
        (100, 1.984),
        (10**6, 1.96),
    ],
)
def test_student_as_published(degrees: int, t: float) -> None:
    """The table that every textbook prints."""
    assert student_t(degrees) == pytest.approx(t, abs=5e-4)
    assert student_t(5, 0.99) == pytest.approx(4.032, abs=5e-4)


def test_estimates() -> None:
    """Which interval is taken: Wilson's and Tango's for 0/1, Student's t for fractions, never one without width."""
    assert mean_estimate([1.0, 0.0, 1.0, 1.0]) == Estimate(0.75, *wilson(3, 4))
    assert mean_estimate([1.0]) == Estimate(1.0, *wilson(1, 1))
    assert mean_estimate([0.5, 0.5, 0.5]) == Estimate(0.5, *wilson(1.5, 3))
    fractions = mean_estimate([0.25, 0.5, 0.75])
    assert fractions.mean - fractions.low == pytest.approx(min(0.5, 4.303 * 0.25 / 3**0.5), abs=1e-3)
    assert paired_estimate([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]) == Estimate(0.0, *tango(1, 1, 3))
    assert paired_estimate([1.0, 1.0], [1.0, 1.0]).low < -0.5
    uneven = paired_estimate([0.5, 1.0, 0.75], [0.25, 1.0, 0.25])
    assert (uneven.mean, uneven.high - uneven.low) == (0.25, pytest.approx(2 * 4.303 * 0.25 / 3**0.5, abs=1e-3))
    assert paired_estimate([0.5, 0.5], [0.25, 0.25]).low < 0 < paired_estimate([0.5, 0.5], [0.25, 0.25]).high


def test_the_mean_of_means() -> None:
    """Distances of the bounds add up by squares, each side for itself; one part is left as it is."""
    parts = [Estimate(0.5, 0.2, 0.6), Estimate(0.9, 0.5, 1.0)]
    mean = mean_of_means(parts)
    assert (mean.mean, mean.low, mean.high) == pytest.approx((0.7, 0.7 - 0.5 / 2, 0.7 + 0.02**0.5 / 2))
    alone = Estimate(0.7, 0.1, 0.9)  # 0.7 - (0.7 - 0.1) is not 0.1
    assert mean_of_means([alone]) == alone


def test_intervals_hold_what_they_promise() -> None:
    """Of intervals from drawn samples, about 95 % contain the truth."""
    rng = random.Random(0)
    held = pairs_held = 0
    for _ in range(400):
        base = [float(rng.random() < 0.7) for _ in range(60)]
        other = [score if rng.random() < 0.8 else float(rng.random() < 0.5) for score in base]
        low_high = mean_estimate(base)
        held += low_high.low <= 0.7 <= low_high.high
        difference = paired_estimate(other, base)
        pairs_held += difference.low <= 0.2 * (0.5 - 0.7) <= difference.high
    assert 0.92 <= held / 400 <= 0.98
    assert 0.92 <= pairs_held / 400 <= 0.98
