"""Products of rows with a weight matrix of 4-bit codes, for copies of the weights that draft (engine/speculation/).

A weight is `min + scale * code`, with codes 0 … 15. The pair is float16, one for each group of 32 neighbouring
channels of a row, and codes are computed from the rounded pair, as kernels/packing.py does it for entries. So a weight
takes five bits. A checkpoint that was itself made from such groups of 16 levels comes back almost as it was.

Words of 32 bits hold eight codes, in the order that loops over groups like: word p of a group holds its channels
8p … 8p + 7, the first in the lowest bits, and the same word of the next group is the next one in memory.

There is no choice of ways as in kernels/int8.py. torch has a product of 4-bit weights, but needs them in an order of
its own, and on a CPU without AVX-512 it was five times slower than its product of 8-bit ones. So what is not compiled
makes floats of some rows at a time, which takes longer than a product with float weights: these weights are for
compiled steps. By hand, 10^9 weights of 9,216 x 1,536 times one row, in a second of one busy core of such a CPU: 3.3
compiled and 0.2 not; with 8 bits 3.9 compiled, with float32 3.3. There they save memory, and no time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels.packing import codes_of, pairs_of
from fastkv.kernels.tracing import GRAPH, recording

GROUP = 32  # channels
_PLACES = 8  # codes in a word
_WORDS = GROUP // _PLACES  # of a group
_LEVELS = 15
_ON_CPU = 2**18  # weights that are floats at a time: 1 MiB, which a core's own cache holds
_ON_GPU = 2**22


def shapes(n_out: int, n_in: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of the words and of the pairs of a matrix [n_out, n_in]; n_in is a multiple of GROUP."""
    return ((n_out, n_in // _PLACES), torch.int32), ((n_out, 2, n_in // GROUP), torch.float16)


def scratch_bytes(device: torch.device) -> int:
    """What a product makes and lets go at most: codes of some rows apart, float32 of them and their pairs, 16 bits."""
    count = _at_a_time(device)
    return (4 + 4 + 2) * count + 2 * 4 * count // GROUP


def quantise_(words: Tensor, pairs: Tensor, matrix: Tensor) -> None:
    """Fill words int32 [O, E / 8] and pairs float16 [O, 2, E / 32], minimum and scale, from a float matrix [O, E].

    Values beyond float16 are taken for its largest.
    """
    rows = _rows_at_a_time(matrix.shape[1], words.device)
    for into, pair, part in zip(words.split(rows), pairs.split(rows), matrix.split(rows), strict=True):
        groups = part.to(device=words.device, dtype=torch.float32).unflatten(1, (-1, GROUP))  # [o, G, 32]
        low, scale = pairs_of(groups, 2, _LEVELS)
        pair.copy_(torch.stack((low, scale), dim=1))
        codes = codes_of(groups, low.unsqueeze(2), scale.unsqueeze(2), _LEVELS)
        apart = codes.to(torch.int32).unflatten(2, (_WORDS, _PLACES)) << _shifts(words.device)  # [o, G, 4, 8]
        into.copy_(apart.sum(3, dtype=torch.int32).transpose(1, 2).flatten(1))


def dequantised(words: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """words int32 [..., E / 8] and pairs float16 [..., 2, E / 32] -> the matrix as floats, [..., E]."""
    apart = words.unflatten(-1, (_WORDS, -1)).transpose(-1, -2).unsqueeze(-1)  # [..., G, 4, 1]
    codes = (apart >> _shifts(words.device)).bitwise_and_(_LEVELS).flatten(-2)  # [..., G, 32]
    low, scale = pairs.float().unsqueeze(-1).unbind(-3)  # [..., G, 1]
    return (codes * scale).add_(low).flatten(-2).to(dtype)


def int4_product(x: Tensor, words: Tensor, pairs: Tensor) -> Tensor:
    """x [..., E], words int32 [O, E / 8], pairs float16 [O, 2, E / 32] -> [..., O] in x's dtype."""
    if torch.compiler.is_compiling() or recording.kind == GRAPH:
        return _compiled(x, words, pairs)
    return dequantised_product(x, words, pairs)


def dequantised_product(x: Tensor, words: Tensor, pairs: Tensor) -> Tensor:
    """As floats, some rows at a time, so that there is never a whole matrix of them."""
    rows = _rows_at_a_time(x.shape[-1], x.device)
    pieces = zip(words.split(rows), pairs.split(rows), strict=True)
    made = [F.linear(x, dequantised(*piece, x.dtype)) for piece in pieces]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _compiled(x: Tensor, words: Tensor, pairs: Tensor) -> Tensor:
    """What a compiler is given: of few rows on a CPU sums that it writes a loop for; else a product that widens."""
    few = recording.kind == GRAPH or all(size == 1 for size in x.shape[:-1])
    if x.device.type != "cpu" or not few:
        return F.linear(x, dequantised(words, pairs, x.dtype))
    rows = x.reshape(-1, x.shape[-1]).float()
    sums = [_sums_of_words(row, words, pairs) for row in rows.unbind()]
    return torch.stack(sums).to(x.dtype).view(*x.shape[:-1], len(words))


def _sums_of_words(row: Tensor, words: Tensor, pairs: Tensor) -> Tensor:
    """row float32 [E] times the weights -> sums float32 [O].

    Codes are not moved to the end of their word: as in kernels/int8.py, activations are as much smaller as a code is
    larger where it is. The last one of a word has its sign, and is moved.
    """
    groups = row.view(-1, _WORDS, _PLACES)  # [G, 4, 8]
    last = _PLACES - 1
    parts = torch.stack([groups[:, :, place].t() * 2.0 ** (-4 * (place % last)) for place in range(_PLACES)])
    words = words.view(len(words), _WORDS, -1)  # [O, 4, G], as parts[place] is [4, G]
    sums = ((words >> 4 * last) & _LEVELS).float() * parts[last]
    for place in range(last):
        sums = sums + (words & (_LEVELS << 4 * place)).float() * parts[place]
    low, scale = pairs.float().unbind(1)  # [O, G]
    return (sums.sum(dim=1) * scale + low * groups.sum(dim=(1, 2))).sum(dim=1)


def _rows_at_a_time(n_in: int, device: torch.device) -> int:
    return max(1, _at_a_time(device) // n_in)


def _at_a_time(device: torch.device) -> int:
    return _ON_CPU if device.type == "cpu" else _ON_GPU


def _shifts(device: torch.device) -> Tensor:
    """Of each code in its word."""
    return torch.arange(0, 4 * _PLACES, 4, dtype=torch.int32, device=device)
