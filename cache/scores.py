"""Importance scores: how much the queries of a prompt attend to each token (arXiv 2404.14469, 2502.01068, and others).

Where a sequence continues from a cache, k begins with the entries that were kept earlier, and q holds queries of the
new tokens only: these may be fewer than the observation window, and then all of them score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels.key_products import has_float32_products, products

# Attention weights that are held at a time where all queries score: what a CPU's cache holds, but of a long prompt some
# queries at the least (benchmarks/choices.py). On a GPU, where each block costs launches, not measured.
_BLOCK_VALUES = {"cpu": 2**20, "cuda": 2**26}
_LEAST_QUERIES = 32


def recent_attention(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Attention of the last `window` queries to the tokens before them, the later a query the more it weighs.

    q: [B, Hq, n, D] of the last n tokens and k: [B, Hkv, T, D] of all, rotated; T > window. Weights rise linearly to
    the last query and sum to one. Returns float32 [B, Hkv, T - window], the mean over each group.
    """
    attention = window_attention(q, k, window)[..., :-window]  # [B, Hkv, G, W, T - W]
    weights = torch.arange(1, attention.shape[3] + 1, dtype=torch.float32, device=q.device)
    return torch.einsum("bhgwt,w->bht", attention, weights / weights.sum()) / attention.shape[2]


def window_attention(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Causal attention of the last `window` queries (all n, if there are fewer): float32 [B, Hkv, G, W, T].

    q: [B, Hq, n, D] and k: [B, Hkv, T, D], rotated; G query heads read a KV head.
    """
    q = q[:, :, -window:]
    window, head_dim = q.shape[-2:]
    # The queries of a KV head's group are the rows of one matrix product: K is never repeated.
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G * W, D]
    logits = grouped @ k.transpose(-1, -2) if k.dtype == torch.float32 else products(grouped, k)
    logits = logits.div_(head_dim**0.5).unflatten(2, (-1, window))
    ahead = torch.ones(window, window, dtype=torch.bool, device=q.device).triu(1)  # only the window can look ahead
    logits[..., -window:].masked_fill_(ahead, float("-inf"))
    return logits.softmax(dim=-1)


def drafted_attention(q: Tensor, k: Tensor, drafted_k: Tensor, live: Tensor) -> Tensor:
    """Attention of m drafted tokens to the T tokens before them: float32 [B, Hkv, G, m, T] (arXiv 2505.20334).

    q: [B, Hq, m, D] and drafted_k: [B, Hkv, m, D] of the drafted tokens, k: [B, Hkv, T, D], all rotated. A drafted
    token attends to all T, to those drafted before it and to itself, so that a row sums to less than one. live: bool
    [B, m]; the row of a token that is not live is zero.
    """
    n_drafted = q.shape[2]
    attention = window_attention(q, torch.cat((k, drafted_k), dim=2), n_drafted)[..., :-n_drafted]
    return attention * live[:, None, None, :, None]


def over_queries(attention: Tensor, queries: str) -> Tensor:
    """What the tokens receive from all queries of the window: [B, Hkv, G, W, T] -> [B, Hkv, G, T].

    queries: "sum", as in the papers, or "max": one query that looks at a token is enough (arXiv 2510.13334).
    """
    return attention.sum(dim=-2) if queries == "sum" else attention.amax(dim=-2)


def forward_pooled(scores: Tensor, reach: int) -> Tensor:
    """Each score lifts the `reach` tokens after it, and none before it: scores [..., T] -> the same shape.

    s'_t = max(s_{t - reach}, ..., s_t). An answer is copied from left to right. The queries at the end of a prompt
    attend to where it begins; what the next steps of decoding read stands after that, where no query has looked yet. A
    symmetric pooling of 7 reaches three tokens on, and answers break off there. (No source: measured in
    docs/accuracy.md.)
    """
    rows = F.pad(scores.flatten(0, -2), (reach, 0), value=float("-inf"))
    return F.max_pool1d(rows, reach + 1, stride=1).view_as(scores)


def value_norms(v: Tensor) -> Tensor:
    """Length of each value: v [B, Hkv, T, D] -> float32 [B, Hkv, T]. How much a token adds where it is attended to."""
    return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32)


def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """How much attention each token receives from all queries (arXiv 2306.14048): float32 [B, Hkv, T].

    q: [B, Hq, T, D] and k: [B, Hkv, T, D], rotated; causal. Summed over the queries, and over the query heads of each
    KV head. Computed for a block of queries at a time, so that no T x T matrix is ever there.
    """
    received = torch.zeros(k.shape[:3], device=k.device)

    def take(weights: Tensor) -> None:
        received[..., : weights.shape[-1]] += weights.sum(dim=(2, 3))

    _weights_in_blocks(q, k, take)
    return received


def highest_attention(q: Tensor, k: Tensor, first: int, n_tokens: int) -> Tensor:
    """The most that any query attends to each of `n_tokens` tokens from `first` on (arXiv 2505.23416).

    q: [B, Hq, P, D] of the last P of the tokens of k [B, Hkv, n, D], before which all others stand; rotated. Returns
    float32 [B, Hkv, n_tokens], the most over the query heads of each KV head, too.
    """
    highest = torch.zeros(*k.shape[:2], n_tokens, device=k.device)

    def take(weights: Tensor) -> None:
        torch.maximum(highest, weights[..., first : first + n_tokens].amax(dim=(2, 3)), out=highest)

    _weights_in_blocks(q, k, take)
    return highest


def _weights_in_blocks(q: Tensor, k: Tensor, take: Callable[[Tensor], None]) -> None:
    """Causal attention of the last P of n tokens, some queries at a time.

    q: [B, Hq, P, D] and k: [B, Hkv, n, D], rotated. take: is given float32 [B, Hkv, G, some, m], where the last of the
    queries sees m tokens. No generator, which would hold on to one block while the next is made.
    """
    batch, n_kv_heads, n_tokens, head_dim = k.shape
    keys = k.contiguous() if has_float32_products(k.dtype, k.device) else k.float()  # once for all blocks
    n_before = n_tokens - q.shape[2]
    block = queries_at_a_time(batch, q.shape[1], n_tokens, q.device)
    for start in range(0, q.shape[2], block):
        end = min(start + block, q.shape[2])
        grouped = q[:, :, start:end].unflatten(1, (n_kv_heads, -1)).flatten(2, 3)  # [B, Hkv, G * some, D]
        logits = products(grouped, keys[:, :, : n_before + end]).div_(head_dim**0.5).unflatten(2, (-1, end - start))
        ahead = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        logits[..., n_before + start :].masked_fill_(ahead, float("-inf"))
        take(logits.softmax(dim=-1))


def queries_at_a_time(batch: int, n_heads: int, n_tokens: int, device: torch.device) -> int:
    """Queries whose attention to all tokens is held at a time, where all of them score."""
    return tokens_at_a_time(batch * n_heads * n_tokens, device)


def tokens_at_a_time(width: int, device: torch.device) -> int:
    """Tokens that are held at a time in float32, each of `width` values."""
    return max(_LEAST_QUERIES, _BLOCK_VALUES[device.type] // width)


def last_query_scores(q: Tensor, k: Tensor, kernel: int) -> Tensor:
    """How well the last query matches each key before it (arXiv 2409.17422): float32 [B, Hkv, T - 1].

    q: [B, Hq, n, D] of the last n >= 1 tokens and k: [B, Hkv, T, D] of all, rotated; T > 1. The bare products, summed
    over the query heads of each KV head, average-pooled along the tokens (the zeros of the padding counted).
    """
    grouped = q[:, :, -1].unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, D]
    return pooled(products(grouped, k), kernel, "avg").sum(dim=2)[..., :-1]


def pooled(scores: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool [..., n] along the tokens, length unchanged: the "max" or "avg" of `kernel` neighbours, an odd number."""
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return pool(scores.flatten(0, -2), kernel, stride=1, padding=kernel // 2).view_as(scores)


def best(scores: Tensor, counts: int | Tensor) -> Tensor:
    """Which are the `counts` best of each head: scores [B, H, n] -> bool [B, H, n]. counts: one, or int64 [B, H]."""
    if not isinstance(counts, int):
        return ranks(scores) < counts.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(counts, dim=-1).indices, True)


def ranks(scores: Tensor) -> Tensor:
    """The place of each score in falling order, from 0: scores [..., n] -> float32 [..., n]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device).expand_as(scores)
    return torch.empty_like(places).scatter_(-1, order, places)


def shifted_mean(scores: Tensor, widths: list[int], shifts: list[int]) -> Tensor:
    """The mean of each token's neighbours, moved along: scores [B, H, n] -> the same shape.

    For each sequence, its own odd width, and by how many tokens the result is moved towards the end (below 0: towards
    the beginning). Beyond the ends the first and the last score go on.
    """
    reach = max(width // 2 + abs(shift) for width, shift in zip(widths, shifts, strict=True))
    padded = F.pad(scores, (reach, reach), mode="replicate")
    means = []
    for one, width, shift in zip(padded, widths, shifts, strict=True):
        first = reach - width // 2 - shift
        means.append(F.avg_pool1d(one[:, first : first + scores.shape[-1] + width - 1], width, stride=1))
    return torch.stack(means)
