"""The counter-based generator: uniform over seeds, over steps and in pairs of neighbours. All of it repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastkv.engine.counter_rng import stream_of, uniform

N = 1 << 17
SEEDS = {"small": 0, "large": 2**62 - 5, "the largest": 2**63 - N}


def over_seeds(first: int = 0, step: int = 0) -> Tensor:
    """The number at one step of N neighbouring seeds."""
    seeds = first + torch.arange(N)
    return uniform(stream_of(seeds), torch.full((N,), step))


def over_steps(seed: int) -> Tensor:
    """The first N numbers of one seed."""
    return uniform(stream_of(torch.tensor([seed])), torch.arange(N))


def assert_uniform(cells: Tensor, n_cells: int) -> None:
    """A chi-square test of cell numbers int64 [N]: within 4 standard deviations, on both sides.

    Fair numbers fail once in 15,000 times. Too even a spread is refused as well: a plain counter has it.
    """
    expected = len(cells) / n_cells
    statistic = float(((torch.bincount(cells, minlength=n_cells) - expected) ** 2 / expected).sum())
    assert abs(statistic - (n_cells - 1)) < 4 * math.sqrt(2 * (n_cells - 1)), statistic


def assert_neighbours_independent(values: Tensor) -> None:
    """No linear correlation of a number with the next ones, and an even spread of such pairs over a grid of 32 x 32."""
    for lag in (1, 2, 3):
        correlation = float(torch.corrcoef(torch.stack((values[:-lag], values[lag:])))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(N), (lag, correlation)
        assert_uniform((values[:-lag] * 32).long() * 32 + (values[lag:] * 32).long(), 1024)


@pytest.mark.parametrize("first", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_uniform_over_seeds(first: int, step: int) -> None:
    values = over_seeds(first, step)
    assert_uniform((values * 1024).long(), 1024)
    assert_neighbours_independent(values)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32, 2**63 - 1])
def test_uniform_over_steps(seed: int) -> None:
    values = over_steps(seed)
    assert_uniform((values * 1024).long(), 1024)
    assert_neighbours_independent(values)


def test_low_bits_are_uniform_too() -> None:
    for values in (over_seeds(), over_steps(0)):
        assert_uniform((values * 2**53).long() % 1024, 1024)


def test_neighbouring_seeds_do_not_share_a_stream() -> None:
    """Seeds that were counted along with the steps gave seed 1 the numbers of seed 0, one step later."""
    first, second = over_steps(0), over_steps(1)
    assert not torch.isin(first, second).any()
    correlation = float(torch.corrcoef(torch.stack((first, second)))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(N)
    assert_uniform((first * 32).long() * 32 + (second * 32).long(), 1024)


def test_values_lie_in_the_half_open_unit_interval() -> None:
    values = torch.cat((over_seeds(), over_steps(N)))  # no pair of seed and step twice
    assert values.dtype == torch.float64
    assert ((values >= 0) & (values < 1)).all()
    assert torch.equal(values * 2**53, (values * 2**53).floor())
    assert len(values.unique()) == len(values)


def plain(seed: int, step: int) -> float:
    """The same numbers in Python's own integers, which do not wrap: every 64-bit operation is spelled out."""
    mask = 2**64 - 1

    def mix(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
        return bits ^ (bits >> 31)

    stride = 0x9E3779B97F4A7C15
    return (mix((mix((seed + stride) & mask) + step * stride) & mask) >> 11) / 2**53


def test_the_numbers_are_those_of_exact_integer_arithmetic() -> None:
    """So they are the same on every device. One by one or all at once: vectorised multiplication wraps as well."""
    cases = [(seed, step) for seed in (0, 1, 2**31, 2**63 - 1, 123456789) for step in (0, 1, 2, 1000, 2**40)]
    seeds, steps = (torch.tensor(column) for column in zip(*cases, strict=True))
    expected = [plain(*case) for case in cases]
    assert uniform(stream_of(seeds), steps).tolist() == expected
    assert [float(uniform(stream_of(seed), step)) for seed, step in zip(seeds, steps, strict=True)] == expected
