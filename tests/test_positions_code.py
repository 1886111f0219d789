"""Positions in few bytes: what comes back, how many bytes it takes, and what is no such code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkv.cache.positions_code import as_bytes, decode, encode, from_bytes, width_of

N = 20_000


def chosen(share: float, n_heads: int = 2, seed: int = 0) -> Tensor:
    """Random positions below N: int64 [n_heads, n]."""
    drawn = torch.rand(n_heads, N, generator=torch.Generator().manual_seed(seed))
    return drawn.topk(max(1, round(N * share))).indices.sort().values


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 1 / 16, 1 / 128, 1e-3, 1e-4], ids=str)
def test_positions_come_back_and_take_little(share: float) -> None:
    """Never more than a bit for each that there was, and little more than a byte where few stay."""
    positions = chosen(share)
    data = encode(positions)
    assert torch.equal(decode(data, 2, N, positions.numel()), positions)
    heads = 2 * (5 + 1)
    assert len(data) <= 2 * N / 8 + heads
    if share > 1e-3:
        assert len(data) <= 1.25 * positions.numel() + heads
    else:
        assert len(data) <= 4 * positions.numel() + heads


@pytest.mark.parametrize("gap", [1, 2, 254, 255, 256, 257, 510, 511, 65534, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_gaps_of_every_size(gap: int, count: int) -> None:
    """Those that fill a unit, or go on in the next one, and those that are alone."""
    positions = (gap * torch.arange(1, count + 1) - 1).unsqueeze(0)
    assert torch.equal(decode(encode(positions), 1, gap * count, count), positions)


def test_heads_of_different_lengths() -> None:
    positions = torch.tensor([[0, 3, 9, 500], [7, -1, -1, -1], [-1] * 4, [1, 2, -1, -1]])
    assert torch.equal(decode(encode(positions), 4, 501, 7), positions)
    nothing = torch.empty(3, 0, dtype=torch.int64)
    assert torch.equal(decode(encode(nothing), 3, 0, 0), nothing)


@pytest.mark.parametrize("share", [0.5, 0.1, 1e-3], ids=["bits", "one byte", "two bytes"])
def test_what_is_no_code_is_refused(share: float) -> None:
    positions = chosen(share)
    data, most = encode(positions), positions.numel()
    for cut in (0, 1, 4, 5, 6, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"cut off|missing"):
            decode(data[:cut], 2, N, most)
    for wrong, n_heads, below, count in (
        (torch.cat((data, data[:1])), 2, N, most),
        (data, 1, N, most),
        (data, 2, int(positions.max()), most),
        (data, 2, N, most - 1),
    ):
        with pytest.raises(ValueError, match="more"):
            decode(wrong, n_heads, below, count)
    for code in (3, 255):
        wrong = data.clone()
        wrong[0] = code
        with pytest.raises(ValueError, match="no code"):
            decode(wrong, 2, N, most)


def test_a_gap_that_never_ends_is_refused() -> None:
    data = torch.tensor([1, 2, 0, 0, 0, 3, 255], dtype=torch.uint8)
    with pytest.raises(ValueError, match="gap is cut off"):
        decode(data, 1, 1000, 10)


def test_many_bits_are_refused_before_they_are_spread_out() -> None:
    """A bit becomes eight bytes: no more of them are looked at than there are tokens."""
    bits = torch.full((1000,), 255, dtype=torch.uint8)
    data = torch.cat((torch.tensor([0, 0xE8, 3, 0, 0], dtype=torch.uint8), bits))
    assert decode(data, 1, 8000, 8000).shape == (1, 8000)
    with pytest.raises(ValueError, match="cut off"):
        decode(data, 1, 7000, 8000)


@pytest.mark.parametrize(
    ("n_values", "width"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**24 + 1, 4)], ids=str
)
def test_numbers_as_bytes(n_values: int, width: int) -> None:
    assert width_of(n_values) == width
    numbers = torch.tensor([0, n_values // 2, n_values - 1])
    assert as_bytes(numbers, width).tolist() == [
        byte for number in numbers.tolist() for byte in number.to_bytes(width, "little")
    ]
    assert torch.equal(from_bytes(as_bytes(numbers, width), width), numbers)
    if width > 1:
        with pytest.raises(ValueError, match="cut off"):
            from_bytes(as_bytes(numbers, width)[1:], width)
