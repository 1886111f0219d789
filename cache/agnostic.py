"""Scores that ask no question: what of a prompt to keep when it is not known yet what will be asked of it.

By the keys alone (arXiv 2504.15364), by keys and what the prompt's own tokens attend to nearby (arXiv 2507.08143), or
by what later queries will attend to if they are like those so far (arXiv 2510.00636). All in blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.scores import pooled, tokens_at_a_time, value_norms
from fastkv.kernels.key_products import products

Part = Callable[[int, int], Tensor]  # the tokens start … end - 1 of a tensor that is never there as a whole


def blocks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """The tokens start … end - 1, `size` of them at a time: (first, one after the last)."""
    yield from ((first, min(first + size, end)) for first in range(start, end, size))


def unlikeness(k: Tensor) -> Tensor:
    """How little each key points to where the keys of its head point on average (arXiv 2504.15364).

    k: [B, Hkv, T, D] -> minus the cosine to the mean of the unit keys, float32 [B, Hkv, T].
    """
    batch, n_heads, n_tokens, head_dim = k.shape
    spans = list(blocks(0, n_tokens, tokens_at_a_time(batch * n_heads * head_dim, k.device)))

    def unit(start: int, end: int) -> Tensor:
        return F.normalize(k[:, :, start:end].float(), dim=-1)

    total = k.new_zeros(batch, n_heads, head_dim, dtype=torch.float32)
    for start, end in spans:
        total += unit(start, end).sum(dim=2)
    mean = F.normalize(total, dim=-1).unsqueeze(-1)  # [B, Hkv, D, 1]
    return torch.cat([(unit(start, end) @ mean).squeeze(-1).neg_() for start, end in spans], dim=-1)


def sketch(head_dim: int, width: int, device: torch.device) -> Tensor:
    """A Gaussian matrix, always the same: float32 [head_dim, width], which keeps lengths on average."""
    drawn = torch.randn(head_dim, width, generator=torch.Generator().manual_seed(0), device="cpu")
    return drawn.div_(width**0.5).to(device)


def leverage(keys: Part, start: int, end: int, size: int, projection: Tensor | None, ridge: float) -> Tensor:
    """How far each key lies out among all of its head (arXiv 2507.08143): float32 [B, Hkv, end - start], 0 to 1.

    x (X^T X + ridge I)^-1 x^T for the rows x of X: the keys, float32 [B, Hkv, n, D] of any tokens, times `projection`
    [D, w] (None: as they are), less their mean. size: tokens at a time.
    """
    spans = blocks(start, end, size)
    rows = torch.cat([keys(*span) if projection is None else keys(*span) @ projection for span in spans], dim=2)
    rows -= rows.mean(dim=2, keepdim=True)
    whiten = _whitening(rows, size, ridge)
    found = [(rows[:, :, first:after] @ whiten).square_().sum(dim=-1) for first, after in blocks(0, end - start, size)]
    return torch.cat(found, dim=-1)


def _whitening(rows: Tensor, size: int, ridge: float) -> Tensor:
    """W of rows X [B, Hkv, n, w] with W W^T = (X^T X + ridge I)^-1: float32 [B, Hkv, w, w].

    By way of float64, where a sum over a long prompt does not cost the ridge.
    """
    eye = torch.eye(rows.shape[-1], dtype=torch.float64, device=rows.device)
    gram = (ridge * eye).repeat(*rows.shape[:2], 1, 1)
    for first, after in blocks(0, rows.shape[2], size):
        part = rows[:, :, first:after].double()
        gram += part.transpose(2, 3) @ part
    lower = torch.linalg.cholesky_ex(gram).L
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False).transpose(2, 3).float()


def attention_nearby(q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """What each token receives within its chunk, from tokens before and after it (arXiv 2507.08143).

    q: [B, Hq, T, D] and k: [B, Hkv, T, D], rotated. Softmax of the bare products, not divided by sqrt(D), over `chunk`
    tokens (the last chunk may be shorter); the sum over the queries, the mean over the group: float32 [B, Hkv, T].
    """
    batch, n_heads, n_tokens, _ = q.shape
    at_a_time = chunks_at_a_time(batch * n_heads, chunk, q.device)
    whole = n_tokens // chunk * chunk
    spans = [(*span, chunk) for span in blocks(0, whole, at_a_time * chunk)]
    if whole < n_tokens:
        spans.append((whole, n_tokens, n_tokens - whole))
    received = []
    for start, end, width in spans:
        queries = q[:, :, start:end].unflatten(1, (k.shape[1], -1)).unflatten(3, (-1, width))  # [B, Hkv, G, c, w, D]
        rows = queries.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)  # [B, Hkv * c, G * w, D]
        keys = k[:, :, start:end].unflatten(2, (-1, width)).flatten(1, 2)  # [B, Hkv * c, w, D]
        summed = products(rows, keys).softmax(dim=-1).sum(dim=2)  # [B, Hkv * c, w]
        received.append(summed.unflatten(1, (k.shape[1], -1)).flatten(2))
    return torch.cat(received, dim=-1) / (n_heads // k.shape[1])


def chunks_at_a_time(n_heads: int, chunk: int, device: torch.device) -> int:
    """Chunks whose attention is held at a time, of all sequences' query heads."""
    return max(1, tokens_at_a_time(n_heads * chunk, device) // chunk)


def compactor_scores(
    outlying: Tensor, received: Tensor, v: Tensor, weight: float, all_heads: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Leverage and attention in one score, float32 [B, Hkv, T] (arXiv 2507.08143).

    received: what `attention_nearby` gives; times the length of v [B, Hkv, T, D], it is the mean of three neighbours.
    Both are counted in standard deviations from the mean over all heads and tokens; attention weighs `weight`.
    all_heads: makes the values of all heads of those of some (Observation.all_heads).
    """
    attended = pooled(received * value_norms(v), 3, "avg")
    return _standard(outlying, all_heads(outlying)) + weight * _standard(attended, all_heads(attended))


def _standard(x: Tensor, among: Tensor) -> Tensor:
    deviation = among.std(dim=(1, 2), keepdim=True, correction=0).clamp_min(1e-6)
    return (x - among.mean(dim=(1, 2), keepdim=True)) / deviation


def query_moments(queries: Part, start: int, end: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of queries [B, Hq, n, D] over the tokens start … end - 1: [B, Hq, D] and [B, Hq, D, D]."""
    count = end - start
    mean = sum(queries(*span).sum(dim=2) for span in blocks(start, end, size)) / count
    assert isinstance(mean, Tensor)

    def spread(part: Tensor) -> Tensor:
        away = part - mean.unsqueeze(2)
        return away.transpose(2, 3) @ away

    covariance = sum(spread(queries(*span)) for span in blocks(start, end, size)) / count
    assert isinstance(covariance, Tensor)
    return mean, covariance


def expected_attention(k: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """What Gaussian queries attend to on average (arXiv 2510.00636): float32 [B, Hkv, T], the mean over the group.

    k: [B, Hkv, T, D], rotated. mean: [B, Hq, D] and covariance: [B, Hq, D, D] of the queries, rotated. The softmax of
    the logarithms of E[exp(q k / sqrt(D))].
    """
    batch, n_heads, n_tokens, head_dim = k.shape
    mean = mean.unflatten(1, (n_heads, -1)).unsqueeze(-1)  # [B, Hkv, G, D, 1]
    covariance = covariance.unflatten(1, (n_heads, -1))
    logits = []
    for start, end in blocks(0, n_tokens, tokens_at_a_time(batch * mean.shape[1] * mean.shape[2] * head_dim, k.device)):
        keys = k[:, :, start:end].float().unsqueeze(2)  # [B, Hkv, 1, n, D]
        spread = (keys @ covariance).mul_(keys).sum(dim=-1)
        logits.append((keys @ mean).squeeze(-1) / head_dim**0.5 + spread / (2 * head_dim))
    return torch.cat(logits, dim=-1).softmax(dim=-1).mean(dim=2)
