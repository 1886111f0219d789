"""Attention of one query for each head over packed entries, as sums that a compiler writes loops for.

What packed_attention computes, in another shape: a loop reads codes once for all query heads of a KV head, and what
they stand for is never in memory. The loops that torch's compiler writes load words many at a time, but single bytes
one by one; so codes come as words of 32 bits, and those in the same place of each word, a plane, are taken together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from fastkv.kernels.packing import SCHEMES, Packed, Scheme

_WORD = 32  # bits


def has_words(head_dim: int) -> bool:
    """Whether the codes of an entry fill words, so that there are loops for them."""
    return all(head_dim * scheme.bits % _WORD == 0 for scheme in SCHEMES.values())


def has_loops(head_dim: int, windows: Sequence[int | None]) -> bool:
    """Whether there are loops for all layers of a model: they know no sliding window."""
    return has_words(head_dim) and not any(windows)


def in_words(packed: Packed) -> Packed:
    """Blocks with their codes as int32 [.., W / 4]: views."""
    return packed._replace(k=packed.k.view(torch.int32), v=packed.v.view(torch.int32))


def packed_loops(rows: Tensor, words: Packed, k: Tensor, v: Tensor) -> Tensor:
    """rows [h, R, D] over n packed blocks of h heads (`in_words`), and over the exact k and v [h, m, D] -> [h, R, D].

    Sums are float32.
    """
    scheme = scheme_of(words.k, rows.shape[2])
    queries = rows.float() * rows.shape[2] ** -0.5
    logits, exact = _logits(scheme, queries, words), queries @ k.float().transpose(1, 2)
    # Sums of sums: over more than thousands at once a compiler goes another way, and one code would not do for all.
    highest = torch.maximum(logits.amax(dim=3).amax(dim=2), exact.amax(dim=2)).unsqueeze(2)  # [h, R, 1]
    weights, of_exact = _in_memory((logits - highest.unsqueeze(3)).exp()), (exact - highest).exp()
    total = weights.sum(dim=3).sum(dim=2) + of_exact.sum(dim=2)
    attended = _values(scheme, weights, words) + of_exact @ v.float()
    return (attended / total.unsqueeze(2)).to(rows.dtype)


def scheme_of(words: Tensor, head_dim: int) -> Scheme:
    """That of codes in words, [.., W / 4]."""
    bits = words.shape[-1] * _WORD // head_dim
    return next(scheme for scheme in SCHEMES.values() if scheme.bits == bits)


def _logits(scheme: Scheme, queries: Tensor, words: Packed) -> Tensor:
    """queries [h, R, D] -> [h, R, n, block]."""
    low, scale = words.k_params.float().unbind(2)  # [h, n, D]
    below = (low @ queries.transpose(1, 2)).transpose(1, 2).unsqueeze(3)  # [h, R, n, 1]
    scaled = _in_memory(queries.unsqueeze(1) * scale.unsqueeze(2))
    scaled = _in_memory(_by_plane(scheme, scaled))  # [h, n, R, planes, W / 4]
    planes = [_unsigned(words.k, scheme.bits, place).float() for place in places_of(scheme)]
    sums = []
    for row in scaled.unbind(2):
        each = [plane * part.unsqueeze(2) for plane, part in zip(planes, row.unbind(2), strict=True)]
        sums.append(reduce(add, each).sum(dim=3))  # [h, n, block]
    return torch.stack(sums, dim=1) + below


def _values(scheme: Scheme, weights: Tensor, words: Packed) -> Tensor:
    """What weights [h, R, n, block] take of V -> [h, R, D]."""
    params = words.v_params.float()  # [h, n, block, N, P]
    groups = [_in_memory(weights * params[:, None, :, :, -1, group]) for group in range(params.shape[4])]
    read = _signed if scheme.signed else _unsigned
    planes = [read(words.v, scheme.bits, place).float() for place in places_of(scheme)]
    halves = 8 // scheme.bits
    sums = []
    for row in range(weights.shape[1]):
        factors = [groups[place % halves % len(groups)][:, row].unsqueeze(3) for place in range(len(planes))]
        each = [(plane * factor).sum(dim=2).sum(dim=1) for plane, factor in zip(planes, factors, strict=True)]
        sums.append(torch.stack(each, dim=2))  # [h, W / 4, planes]
    attended = torch.stack(sums, dim=1).unflatten(3, (4, halves))  # [h, R, W / 4, 4, halves]
    attended = attended.permute(0, 1, 4, 2, 3).flatten(2)
    if scheme.signed:
        return attended
    below = (weights.unsqueeze(4) * params[:, None, :, :, 0]).sum(dim=3).sum(dim=2)  # [h, R, P]
    return (attended.unflatten(2, (below.shape[2], -1)) + below.unsqueeze(3)).flatten(2)


def places_of(scheme: Scheme) -> range:
    """The planes: that of place i has the bits of each word from `bits * i` on."""
    return range(_WORD // scheme.bits)


def _by_plane(scheme: Scheme, values: Tensor) -> Tensor:
    """values of channels [.., D] as [.., planes, W / 4]: the halves of a byte are D / 2 channels apart (see Packed)."""
    parts = values.unflatten(-1, (8 // scheme.bits, -1, 4))  # [.., halves, W / 4, 4]
    return parts.movedim(-1, -3).flatten(-3, -2)


def _in_memory(x: Tensor) -> Tensor:
    """x, which no loop computes anew for each of its turns: what is addressed by strides, a compiler writes down."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _unsigned(words: Tensor, bits: int, place: int) -> Tensor:
    return (words >> bits * place) & ((1 << bits) - 1)


def _signed(words: Tensor, bits: int, place: int) -> Tensor:
    return (words << _WORD - bits * (place + 1)) >> _WORD - bits
