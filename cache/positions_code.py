"""Positions in few bytes: those that a policy chose would take 8 bytes each as they are, an entry of a small model 256.

A head's positions ascend, so it is written as the shortest of three codes: a bit for each position there was, or the
gaps between those chosen as units of 1 or 2 bytes. A unit of all ones says that its gap goes on in the next one. Each
head is one byte for its code (0: bits), four for its number of units, then these. All numbers are little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 0  # as a code; the others are the bytes of a unit
_WIDTHS = (1, 2)
_HEAD = 5  # bytes before a head's units


def as_bytes(numbers: Tensor, width: int) -> Tensor:
    """int64 [n], from 0 to below 256 ** width -> uint8 [n * width]."""
    shifts = 8 * torch.arange(width)
    return (numbers.unsqueeze(1) >> shifts).bitwise_and_(255).to(torch.uint8).flatten()


def from_bytes(data: Tensor, width: int) -> Tensor:
    """uint8 [n * width] -> int64 [n]. Raises ValueError for bytes that are no whole numbers."""
    if len(data) % width:
        raise ValueError("a number is cut off")
    shifts = 8 * torch.arange(width)
    return (data.view(-1, width).long() << shifts).sum(dim=1)


def width_of(n_values: int) -> int:
    """Bytes that a number below `n_values` takes."""
    return max(1, -(-(n_values - 1).bit_length() // 8))


def encode(positions: Tensor) -> Tensor:
    """int64 [Hkv, n], ascending, -1 after those of a shorter head -> uint8, on the host."""
    return torch.cat([_encode_head(row[row >= 0]) for row in positions.cpu()])


def decode(data: Tensor, n_heads: int, below: int, most: int) -> Tensor:
    """What `encode` made, back as int64 [Hkv, n].

    Raises ValueError for what it never makes, for a position that is not `below`, and for more than `most` positions
    over all heads, before there is memory for them.
    """
    heads = []
    for _ in range(n_heads):
        code, n_units, data = _head_of(data)
        n_bytes = n_units * max(1, code)
        if n_bytes > len(data) or (code == _BITS and n_bytes > below // 8 + 1):
            raise ValueError("a head is cut off")
        units, data = data[:n_bytes], data[n_bytes:]
        heads.append(_from_bits(units) if code == _BITS else _from_gaps(from_bytes(units, code), code))
        most -= len(heads[-1])
        if most < 0 or (len(heads[-1]) and int(heads[-1][-1]) >= below):
            raise ValueError("there are more positions than entries, or tokens")
    if len(data):
        raise ValueError("there is more than the heads")
    return torch.nn.utils.rnn.pad_sequence(heads, batch_first=True, padding_value=-1)


def _encode_head(row: Tensor) -> Tensor:
    gaps = torch.diff(row, prepend=row.new_tensor([-1])) - 1  # positions left out before each
    sizes = {_BITS: int(row[-1]) // 8 + 1 if len(row) else 0}
    for width in _WIDTHS:
        sizes[width] = width * (len(row) + int((gaps // _unit_of_ones(width)).sum()))
    code = min(sizes, key=sizes.__getitem__)
    units = _to_bits(row, sizes[_BITS]) if code == _BITS else as_bytes(_to_units(gaps, code), code)
    n_units = torch.tensor([sizes[code] // max(1, code)])
    return torch.cat((torch.tensor([code], dtype=torch.uint8), as_bytes(n_units, _HEAD - 1), units))


def _head_of(data: Tensor) -> tuple[int, int, Tensor]:
    """The code of the next head, its number of units, and what follows."""
    if len(data) < _HEAD:
        raise ValueError("a head is missing")
    code = int(data[0])
    if code not in (_BITS, *_WIDTHS):
        raise ValueError(f"{code} is no code")
    return code, int(from_bytes(data[1:_HEAD], _HEAD - 1)), data[_HEAD:]


def _unit_of_ones(width: int) -> int:
    return 256**width - 1


def _to_bits(row: Tensor, n_bytes: int) -> Tensor:
    bits = torch.zeros(8 * n_bytes, dtype=torch.uint8)
    bits[row] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _from_bits(data: Tensor) -> Tensor:
    bits = (data.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten().nonzero().flatten()


def _to_units(gaps: Tensor, width: int) -> Tensor:
    ones = _unit_of_ones(width)
    ends = (gaps // ones + 1).cumsum(0) - 1
    units = torch.full((int(ends[-1]) + 1,), ones)
    units[ends] = gaps % ones
    return units


def _from_gaps(units: Tensor, width: int) -> Tensor:
    ones = _unit_of_ones(width)
    ends = units != ones
    if len(units) and not ends[-1]:
        raise ValueError("a gap is cut off")
    return (units + ends).cumsum(0)[ends] - 1
