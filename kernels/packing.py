"""K and V in few bits: codes, and the numbers that they stand for.

A value is `min + scale * code`: of K one pair for each channel of a block of neighbouring entries, since some channels
are large in all keys (KIVI, arXiv 2402.02750); of V one for each entry and group of channels. Pairs are float16,
computed in float32; codes are computed from the rounded pair, and where the scale is 0 they are 0.

Bytes of an entry, as a share of those that it takes in 16 bits, for a head_dim of 64 and of 128:

int4   K: half a byte a value and 4 for 32, 0.3125. V: half a byte and 4 for 64, 0.28125. Together 0.297.
int8   K: a byte a value and 4 for 64, 0.53125. V: a byte and 2 for a head, 0.5156 or 0.5078. Together 0.523 or 0.520.

So V has no minimum where there are 8 bits, its codes are signed: with it, or with blocks of 32, int8 would take more
than 0.53. Against float32 the shares are half as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST = 65504.0  # of float16
_FLOATS = 1 << 18  # at a time: 1 MiB, which a core's own cache holds
_GROUP = 64  # channels of V up to which 4-bit codes of a head have one pair


class Packed(NamedTuple):
    """Blocks of entries: codes uint8, params float16.

    k: [.., block, W], and k_params [.., 2, D], minimum and scale of each channel. v: [.., block, W], and v_params
    [.., block, N, P], of P groups of channels, N = 2 as for K, or 1 (the scale alone). W = D, or D / 2 where a byte has
    two codes: that of channel i in its low half, that of channel i + D / 2 in its high one.
    """

    k: Tensor
    k_params: Tensor
    v: Tensor
    v_params: Tensor

    def part(self, index: object) -> Packed:
        """Each of the four at an index."""
        return Packed(*(each[index] for each in self))  # type: ignore[index]


@dataclass(frozen=True)
class Scheme:
    """How many bits a code has, and how many entries a block. signed: codes of V are, and have no minimum."""

    bits: int
    block: int
    signed: bool

    @property
    def levels(self) -> int:
        """Steps from the lowest code to the highest."""
        return (1 << self.bits) - 1

    def groups(self, head_dim: int) -> int:
        """Groups of channels of V: a head, or its two halves."""
        return 2 if self.bits == 4 and head_dim > _GROUP else 1

    def shapes(self, head_dim: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of one block of each tensor of `Packed`."""
        codes = (self.block, head_dim * self.bits // 8)
        pairs = (self.block, 1 if self.signed else 2, self.groups(head_dim))
        return (
            (codes, torch.uint8),
            ((2, head_dim), torch.float16),
            (codes, torch.uint8),
            (pairs, torch.float16),
        )

    def block_bytes(self, head_dim: int) -> int:
        """Bytes of one block of one head, params included."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes(head_dim))


SCHEMES = {"int8": Scheme(8, 64, signed=True), "int4": Scheme(4, 32, signed=False)}
KV_DTYPES = tuple(SCHEMES)


def pack(scheme: Scheme, k: Tensor, v: Tensor, into: Packed) -> None:
    """K and V [h, n * block, D] into blocks [h, n, …]; some blocks at a time are float32."""
    blocks_k, blocks_v = (x.unflatten(1, (-1, scheme.block)) for x in (k, v))
    for part in _chunks(blocks_k.shape):
        _pack_keys(scheme, blocks_k[part].float(), into.part(part))
        _pack_values(scheme, blocks_v[part].float(), into.part(part))


def unpack(scheme: Scheme, packed: Packed, k: Tensor, v: Tensor) -> None:
    """What the codes of blocks [h, n, …] stand for, into K and V [h, n * block, D] of any dtype."""
    blocks_k, blocks_v = (x.unflatten(1, (-1, scheme.block)) for x in (k, v))
    for part in _chunks(blocks_k.shape):
        some = packed.part(part)
        low, scale = some.k_params.float().unsqueeze(3).unbind(2)  # [h, n, 1, D]
        blocks_k[part] = (_apart(scheme, some.k) * scale).add_(low)
        params = some.v_params.float().unsqueeze(5)  # [h, n, block, N, P, 1]
        codes = some.v.view(torch.int8).float() if scheme.signed else _apart(scheme, some.v)
        values = codes.unflatten(3, (scheme.groups(v.shape[2]), -1)) * params[:, :, :, -1]
        blocks_v[part] = (values if scheme.signed else values.add_(params[:, :, :, 0])).flatten(3)


def _pack_keys(scheme: Scheme, keys: Tensor, into: Packed) -> None:
    """keys: float32 [h, n, block, D]."""
    low, scale = pairs_of(keys, 2, scheme.levels)
    into.k_params.copy_(torch.stack((low, scale), dim=2))
    into.k.copy_(_joined(scheme, codes_of(keys, low.unsqueeze(2), scale.unsqueeze(2), scheme.levels)))


def _pack_values(scheme: Scheme, values: Tensor, into: Packed) -> None:
    """values: float32 [h, n, block, D]."""
    grouped = values.unflatten(3, (scheme.groups(values.shape[3]), -1))  # [h, n, block, P, g]
    if scheme.signed:
        most = scheme.levels // 2
        scale = _rounded(grouped.abs().amax(dim=4) / most)
        codes = _quotient(grouped, scale.unsqueeze(4)).round_().clamp_(-most, most).to(torch.int8).view(torch.uint8)
        into.v_params.copy_(scale.unsqueeze(3))
    else:
        low, scale = pairs_of(grouped, 4, scheme.levels)
        codes = codes_of(grouped, low.unsqueeze(4), scale.unsqueeze(4), scheme.levels)
        into.v_params.copy_(torch.stack((low, scale), dim=3))
    into.v.copy_(_joined(scheme, codes.flatten(3)))


def chunks_of(n_heads: int, n_blocks: int, floats: int) -> Iterator[slice]:
    """So many blocks of all heads at a time that their values, `floats` in one block of a head, are few."""
    at_a_time = max(1, _FLOATS // max(1, n_heads * floats))
    return (slice(first, min(first + at_a_time, n_blocks)) for first in range(0, n_blocks, at_a_time))


def scratch(n_heads: int, n_blocks: int, block: int, head_dim: int) -> int:
    """Float32 values that a chunk has at most."""
    one = n_heads * block * head_dim
    return min(n_blocks * one, max(one, _FLOATS))


def _chunks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Of blocks [h, n, block, D]: indices of some at a time."""
    return ((slice(None), part) for part in chunks_of(shape[0], shape[1], shape[2] * shape[3]))


def _rounded(values: Tensor) -> Tensor:
    """As float16 has them, in float32."""
    return values.clamp_(-_LARGEST, _LARGEST).half().float()


def pairs_of(values: Tensor, dim: int, levels: int) -> tuple[Tensor, Tensor]:
    """Minimum and scale over a dimension of float32 values, for codes 0 … levels; as float16 has them, in float32."""
    low = _rounded(values.amin(dim=dim))
    return low, _rounded((values.amax(dim=dim) - low) / levels).clamp_min_(0)


def _quotient(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, and 0 where the scale is 0."""
    return values / scale.masked_fill(scale == 0, torch.inf)


def codes_of(values: Tensor, low: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The codes 0 … levels that are nearest to float32 values, uint8; low and scale are broadcast."""
    return _quotient(values - low, scale).round_().clamp_(0, levels).to(torch.uint8)


def _joined(scheme: Scheme, codes: Tensor) -> Tensor:
    """Codes [.., D] as bytes [.., W]."""
    if scheme.bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _apart(scheme: Scheme, codes: Tensor) -> Tensor:
    """Bytes [.., W] as codes [.., D], float32."""
    return codes.float() if scheme.bits == 8 else torch.cat((codes & 15, codes >> 4), dim=-1).float()
