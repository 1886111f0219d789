"""The three attentions of the engine: causal, causal within a sliding window, and one new query over the cache.

All are grouped-query: q [B, Hq, T, D], k and v [B, Hkv, T, D], and K/V are never repeated to the query heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 512  # queries of a sliding-window prefill whose mask is held at a time


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Each query attends to the keys up to its own, of which `window` (None: all) are the nearest. -> [B, Hq, T, D]."""
    if window is None or window >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    blocks = [
        _sliding_block(q, k, v, start, min(start + _QUERY_BLOCK, q.shape[2]), window)
        for start in range(0, q.shape[2], _QUERY_BLOCK)
    ]
    return torch.cat(blocks, dim=2)


def _sliding_block(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, window: int) -> Tensor:
    """The queries start … end - 1, over the keys that any of them can see."""
    first = max(0, start - window + 1)
    queries = torch.arange(start, end, device=q.device).unsqueeze(1)
    keys = torch.arange(first, end, device=q.device)
    visible = (keys <= queries) & (keys > queries - window)
    return F.scaled_dot_product_attention(
        q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=visible, enable_gqa=True
    )


def attend_from(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention of some tokens over the keys of all: what `causal_attention` gives at these rows.

    rows: int64 [B, n], ascending, the places of the queries q [B, Hq, n, D] among the T tokens of k and v. A block of
    queries attends to the keys up to its last row, so that about half of the products are never computed.
    """
    if rows.shape[1] == 1:  # the last token, which sees everything (within the window)
        keys = slice(None) if window is None else slice(-window, None)
        return decode_attention(q, k[:, :, keys], v[:, :, keys])
    places = torch.arange(k.shape[2], device=k.device)
    blocks = []
    for start in range(0, rows.shape[1], _QUERY_BLOCK):
        queries = rows[:, start : start + _QUERY_BLOCK]
        seen = int(queries[:, -1].max()) + 1
        visible = places[:seen] <= queries.unsqueeze(-1)  # [B, n, seen]
        if window is not None:
            visible &= places[:seen] > queries.unsqueeze(-1) - window
        part = q[:, :, start : start + _QUERY_BLOCK]
        blocks.append(
            F.scaled_dot_product_attention(
                part, k[:, :, :seen], v[:, :, :seen], attn_mask=visible.unsqueeze(1), enable_gqa=True
            )
        )
    return torch.cat(blocks, dim=2)


def take_rows(attended: Tensor, rows: Tensor) -> Tensor:
    """The rows int64 [B, n] of attended [B, Hq, T, D]: [B, Hq, n, D]."""
    index = rows[:, None, :, None].expand(-1, attended.shape[1], -1, attended.shape[-1])
    return attended.gather(2, index)


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query for each head, q [B, Hq, 1, D], over all n entries k, v [B, Hkv, n, D]. -> [B, Hq, 1, D].

    The query heads of a KV head become the rows of one product, so that K and V are read once.
    """
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
    return F.scaled_dot_product_attention(rows, k, v).flatten(1, 2).unsqueeze(2)
