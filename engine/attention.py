"""The attentions of the engine: causal (within a sliding window or not), of some rows only, and of one new query.

All are grouped-query: q [B, Hq, T, D], k and v [B, Hkv, T, D], and K/V are never repeated to the query heads.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastkv.errors import FastKVError, check_choice

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
AUTO = "auto"
# On a GPU, cuDNN is the faster one (on an H200 1.9 times at 8K and 32K, 1.7 times at 128K), but prepares itself for
# every new length: 0.03 to 0.2 s a prompt, which is more than it saves at 8K and less at 32K
# (benchmarks/results/2026-11-27-gpu-h200-before.txt).
_CUDNN_FROM = 16_384  # tokens
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_QUERY_BLOCK = 512  # queries whose mask is held at a time, where attention needs one


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, backend: str = AUTO) -> Tensor:
    """Each query attends to the keys up to its own, of which `window` (None: all) are the nearest. -> [B, Hq, T, D].

    backend: the kernels for attention without a window, "auto" or a name in BACKENDS.
    """
    n_tokens = q.shape[2]
    if window is None or window >= n_tokens:
        with _kernels(backend, n_tokens, q.device):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    blocks = []
    for start in range(0, n_tokens, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, n_tokens)
        rows = torch.arange(start, end, device=q.device).unsqueeze(0)
        blocks.append(_masked(rows, q[:, :, start:end], k, v, max(0, start - window + 1), end, window))
    return torch.cat(blocks, dim=2)


def check_backend(
    backend: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Try `backend` on a few tokens of (query heads, KV heads). Raises FastKVError if it cannot do that."""
    check_choice("attention", backend, (AUTO, *BACKENDS))
    q, k = (torch.zeros(1, count, 16, head_dim, dtype=dtype, device=device) for count in heads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains every kernel that it cannot use
            causal_attention(q, k, k, backend=backend)
    except RuntimeError:
        where = f"{str(dtype).removeprefix('torch.')} on {device.type}"
        raise FastKVError(f"attention {backend} does not work here ({where}); use auto", setting="attention") from None


def _kernels(backend: str, n_tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """Which of torch's kernels may run for causal attention of so many tokens."""
    if backend != AUTO:
        return sdpa_kernel(BACKENDS[backend])
    if device.type == "cuda" and n_tokens >= _CUDNN_FROM:
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *_WITHOUT_CUDNN], set_priority=True)
    return without_cudnn(device)


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """For shapes that change from call to call: nothing that prepares itself for each of them."""
    return sdpa_kernel(_WITHOUT_CUDNN, set_priority=True) if device.type == "cuda" else nullcontext()


def attend_from(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention of some tokens over the keys of all: what `causal_attention` gives at these rows.

    rows: int64 [B, n], ascending, the places of the queries q [B, Hq, n, D] among the T tokens of k and v. A block of
    queries attends to the keys up to its last row, so that about half of the products are never computed.
    """
    if rows.shape[1] == 1:  # the last token, which sees everything (within the window)
        keys = slice(None) if window is None else slice(-window, None)
        return decode_attention(q, k[:, :, keys], v[:, :, keys])
    blocks = []
    for start in range(0, rows.shape[1], _QUERY_BLOCK):
        part = rows[:, start : start + _QUERY_BLOCK]
        end = int(part[:, -1].max()) + 1
        blocks.append(_masked(part, q[:, :, start : start + _QUERY_BLOCK], k, v, 0, end, window))
    return torch.cat(blocks, dim=2)


def _masked(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, first: int, end: int, window: int | None) -> Tensor:
    """The queries at `rows`, int64 [B or 1, n], over the keys first … end - 1: all that any of them can see."""
    queries = rows.unsqueeze(-1)
    keys = torch.arange(first, end, device=k.device)
    visible = keys <= queries  # [B or 1, n, end - first]
    if window is not None:
        visible &= keys > queries - window
    with without_cudnn(q.device):
        return F.scaled_dot_product_attention(
            q, k[:, :, first:end], v[:, :, first:end], attn_mask=visible.unsqueeze(1), enable_gqa=True
        )


def take_rows(attended: Tensor, rows: Tensor) -> Tensor:
    """The rows int64 [B, n] of attended [B, Hq, T, D]: [B, Hq, n, D]."""
    index = rows[:, None, :, None].expand(-1, attended.shape[1], -1, attended.shape[-1])
    return attended.gather(2, index)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """One query for each head, q [B, Hq, 1, D], over all n entries k, v [B, Hkv, n, D]. -> [B, Hq, 1, D].

    visible: bool [B, 1, 1, n], the entries that there are (None: all). The query heads of a KV head become the rows of
    one product, so that K and V are read once.
    """
    n_rows = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
    if n_rows == 1 and _two_rows_are_faster(q):
        rows = rows.expand(-1, -1, 2, -1)
    with without_cudnn(q.device):
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible)
    return attended[:, :, :n_rows].flatten(1, 2).unsqueeze(2)


def _two_rows_are_faster(q: Tensor) -> bool:
    """Whether attention of one row takes longer than that of the same row twice (benchmarks/choices.py)."""
    return q.device.type == "cpu" and q.dtype != torch.float32
