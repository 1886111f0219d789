"""Attention of a few queries over packed entries (kernels/packing.py) and the exact ones beside them.

Nothing is written that the codes stand for. As `q · (min + scale * code) = q · min + (q * scale) · code`, the scales
of K go into the queries of each block; those of V go into the weights. What is made of the codes is float32, a few
blocks at a time. Of two codes in a byte the product needs no low one by itself: it is the byte less 16 high ones.

Logits of all entries are there at once, a few numbers for each of them: so K is read before V, and one softmax does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkv.kernels.packing import Packed, Scheme, chunks_of


def packed_attention(
    scheme: Scheme, rows: Tensor, packed: Packed, k: Tensor, v: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """rows [h, R, D] over n packed blocks of h heads, and over the exact entries k and v [h, m, D]. -> [h, R, D].

    hidden: bool [R, n * block + m], what a row does not attend to, packed entries first (None: nothing). Sums are
    float32.
    """
    queries = rows.float() * rows.shape[2] ** -0.5
    logits = [*_logits(scheme, queries, packed), queries @ k.float().transpose(1, 2)]
    every = torch.cat(logits, dim=2)
    if hidden is not None:
        every.masked_fill_(hidden, -torch.inf)
    weights = every.softmax(dim=2)
    n_packed = weights.shape[2] - k.shape[1]
    attended = weights[:, :, n_packed:] @ v.float()
    if n_packed:
        _add_values(scheme, attended, weights[:, :, :n_packed], packed)
    return attended.to(rows.dtype)


def _logits(scheme: Scheme, queries: Tensor, packed: Packed) -> list[Tensor]:
    """queries [h, R, D] -> for some blocks at a time [h, R, n * block]."""
    n_heads, n_blocks, block, width = packed.k.shape
    if not n_blocks:
        return []
    n_rows, head_dim = queries.shape[1:]
    low, scale = packed.k_params.transpose(0, 1).float().unbind(2)  # [n, h, D]
    below = (low.transpose(0, 1) @ queries.transpose(1, 2)).transpose(0, 1).unsqueeze(3)  # [n, h, R, 1]
    scaled = queries * scale.unsqueeze(2)  # [n, h, R, D]
    found = []
    for part in chunks_of(n_heads, n_blocks, block * head_dim):
        codes, some = packed.k[:, part].transpose(0, 1), scaled[part].flatten(0, 1)  # as they are in memory
        logits = below[part].flatten(0, 1)
        if scheme.bits == 8:
            logits = torch.baddbmm(logits, some, _floats(codes).transpose(1, 2))
        else:
            first, second = some[..., :width], some[..., width:]
            logits = torch.baddbmm(logits, first, _floats(codes).transpose(1, 2))
            logits.baddbmm_(second - 16 * first, _floats(codes >> 4).transpose(1, 2))
        found.append(logits.unflatten(0, (-1, n_heads)).permute(1, 2, 0, 3).reshape(n_heads, n_rows, -1))
    return found


def _add_values(scheme: Scheme, attended: Tensor, weights: Tensor, packed: Packed) -> None:
    """Add to attended [h, R, D] what weights [h, R, n * block] take of V."""
    n_heads, n_blocks, block, width = packed.v.shape
    head_dim = attended.shape[2]
    params = packed.v_params.float().flatten(1, 2)  # [h, n * block, N, P]
    scaled = weights.unsqueeze(1) * params[:, :, -1].transpose(1, 2).unsqueeze(2)  # [h, P, R, n * block]
    first, second = scaled[:, 0], None if scaled.shape[1] == 1 else scaled[:, 1]
    for part in chunks_of(n_heads, n_blocks, block * head_dim):
        entries, codes = slice(part.start * block, part.stop * block), packed.v[:, part]
        if scheme.bits == 8:
            attended.baddbmm_(first[:, :, entries], _by_head(codes.view(torch.int8) if scheme.signed else codes))
        else:
            high = _by_head(codes >> 4)
            product = first[:, :, entries] @ high
            attended[:, :, :width] += (first[:, :, entries] @ _by_head(codes)).sub_(product, alpha=16)
            attended[:, :, width:] += product if second is None else second[:, :, entries] @ high
    if not scheme.signed:
        below = weights @ params[:, :, 0]  # [h, R, P]
        attended.unflatten(2, (below.shape[2], -1)).add_(below.unsqueeze(3))


def _floats(codes: Tensor) -> Tensor:
    """Codes [n, h, block, W] of some blocks -> float32 [n * h, block, W]."""
    return codes.float().flatten(0, 1)


def _by_head(codes: Tensor) -> Tensor:
    """Codes [h, n, block, W] of some blocks -> float32 [h, n * block, W]."""
    return codes.to(torch.float32, memory_format=torch.contiguous_format).flatten(1, 2)
