"""Causal attention of some tokens over the keys of all, from two parts that are merged by their log-sum-exps.

On a GPU a mask over all keys leaves the fast kernels. But all queries of a block see every key before the first of
them: these keys are left to flash attention, which needs no mask for that. Only the keys from there on need one, and
these are few, so plain products do. Each part says what its weights sum up to, and so how much it counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels.key_products import products

# Queries at a time: with 32 heads, blocks of 128 rows, and two of these on a multiprocessor they fill an H100.
_BLOCK = 1024
# Float32 logits that are held at a time, for the keys under the mask: 256 MiB, half of that again for the weights.
_LOGITS = 2**26
LOWEST = torch.finfo(torch.float32).min  # a log-sum-exp of nothing, with which one can still reckon
_TINY = torch.finfo(torch.float32).tiny


def merged_attention(indices: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `attend_from` (engine/attention.py) gives without a window; see there for the shapes. -> [B, Hq, n, D].

    Waits for the device once, to learn which keys each block needs.
    """
    firsts, lasts = indices.amin(0).tolist(), indices.amax(0).tolist()  # ascending, as the indices of each sequence
    blocks = []
    for start, end in _blocks(firsts, lasts, _LOGITS // (q.shape[0] * q.shape[1])):
        part = slice(start, end)
        blocks.append(_attend(indices[:, part], q[:, :, part], k, v, firsts[start], lasts[end - 1] + 1))
    return torch.cat(blocks, dim=2)


def _blocks(firsts: Sequence[int], lasts: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each block of queries, given the first and the last place of each query in any sequence.

    A block has at most _BLOCK queries, and fewer where these, times the keys from its first place to its last, would be
    more than `most`.
    """
    start = 0
    while start < len(firsts):
        end = min(start + _BLOCK, len(firsts))
        while end - start > 1 and (end - start) * (lasts[end - 1] + 1 - firsts[start]) > most:
            end = start + (end - start) // 2
        yield start, end
        start = end


def _attend(indices: Tensor, q: Tensor, k: Tensor, v: Tensor, first: int, end: int) -> Tensor:
    """One block: queries at `indices`, int64 [B, n], all from `first` to `end` - 1. -> [B, Hq, n, D]."""
    # The queries of a KV head's group are the rows of one product: K and V are never repeated.
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G * n, D]
    ahead = torch.arange(first, end, device=k.device) > indices.unsqueeze(-1)  # [B, n, end - first]
    attended, sums = near(rows, k[:, :, first:end], v[:, :, first:end], ahead)
    if first > 0:
        before, sums_before = flash(rows, k[:, :, :first], v[:, :, :first])
        share = torch.sigmoid(sums_before - sums).unsqueeze(-1)
        attended = torch.lerp(attended, before.float(), share)
    return attended.to(q.dtype).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def near(rows: Tensor, k: Tensor, v: Tensor, ahead: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention under a mask: rows [B, Hkv, G * n, D]; ahead bool [B, n, s], the keys that a query does not see.

    ahead: None where every query sees every key. -> float32 [B, Hkv, G * n, D], and the log-sum-exps of the logits,
    float32 [B, Hkv, G * n]; of a query that sees no key, zeros and LOWEST.
    """
    logits = products(rows, k).div_(rows.shape[-1] ** 0.5)
    if ahead is not None:
        logits.unflatten(2, (-1, ahead.shape[1])).masked_fill_(ahead[:, None, None], float("-inf"))
    highest = logits.amax(dim=-1, keepdim=True).clamp_(min=LOWEST)  # finite, even of a query that sees no key
    weights = logits.sub_(highest).exp_()  # in place: one tensor of this size
    total = weights.sum(dim=-1, keepdim=True).clamp_(min=_TINY)
    attended = weights.div_(total).to(v.dtype) @ v
    return attended.float(), (highest + total.log()).squeeze(-1)


def flash(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without a mask. -> [B, Hkv, G * n, D], and float32 [B, Hkv, G * n]."""
    # What scaled_dot_product_attention calls; it keeps the log-sum-exps to itself.
    if rows.device.type == "cpu":
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k, v)
    else:
        attended, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(rows, k, v)
    return attended, sums


@functools.cache
def why_not_merged(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why attention is not merged from two parts here, for `group` query heads on each KV head (None: it is).

    The kernel is internal to torch, and versions and devices differ: so it is tried once, on a small sample.
    """
    return "a mask is as fast on a CPU" if device.type != "cuda" else _why_no_sums(group, head_dim, dtype, device)


@functools.cache
def has_sums(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is flash attention here that tells its log-sum-exps, for `group` query heads on each KV head."""
    return _why_no_sums(group, head_dim, dtype, device) is None


def _why_no_sums(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there is none; None: there is."""
    try:
        return None if _agrees_on_a_sample(group, head_dim, dtype, device) else "merging gives other results here"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"no flash attention with log-sum-exps ({str(error).splitlines()[0]})"


@torch.inference_mode()
def _agrees_on_a_sample(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some queries get what a mask gives them, where both parts count and differ."""
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.arange(50, 96, 3, device=device).unsqueeze(0)
    shapes = [(1, heads, tokens, head_dim) for heads, tokens in ((2 * group, indices.shape[1]), (2, 96), (2, 96))]
    q, k, v = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for shape in shapes)
    v[:, :, 50:] += 2  # a wrong share of the two parts would be seen
    visible = torch.arange(96, device=device) <= indices.unsqueeze(-1)
    plain = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=visible, enable_gqa=True)
    difference = merged_attention(indices, q, k, v).float() - plain
    return bool(difference.abs().max() < 0.05)
