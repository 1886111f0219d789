"""The attentions of the engine: causal (within a sliding window or not), of some tokens only, and of one new query.

All are grouped-query: q [B, Hq, T, D], k and v [B, Hkv, n, D]. K/V are repeated to the query heads only where a GPU has
no fast kernel that shares them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastkv.cache.layer import Part
from fastkv.engine.merged_attention import merged_attention, why_not_merged
from fastkv.errors import FastKVError, check_choice
from fastkv.kernels.row_attention import CausalMasks, chosen_way, of_last_tokens, two_rows_are_faster

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
AUTO = "auto"
# On a GPU, cuDNN is the faster one (on an H200 1.9 times at 8K and 32K, 1.7 times at 128K), but prepares itself for
# every new length, which takes 0.05 s at 8K and 0.07 s at 32K. So it gets lengths that come again, multiples of
# _LENGTHS: a first token of new lengths then takes 0.152 s in place of 0.160 s with flash attention and 0.240 s with
# cuDNN as it is, at 32K 0.76 s in place of 0.91 and 0.80. For that the first prompt of such a length waits, at 8K 0.02
# to 0.05 s; the first one of a process for cuDNN itself, too, 0.1 to 0.7 s. Measured in the steps padding, first and
# ceilings of benchmarks/results/2026-11-2*-gpu-h200*.txt, nothing shorter than 8K.
_CUDNN_FROM = 8192  # tokens
# At 8K the padding is at most a quarter of the attention more, at 32K a sixteenth. Longer prompts keep their length:
# their attention takes many times as long as the preparation, and the copy takes memory.
_LENGTHS, _PADDED_BELOW = 1024, 65_536  # tokens
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_cudnn_works = True  # until it raises

_log = logging.getLogger(__name__)

QUERY_BLOCK = 512  # queries whose mask is held at a time, where attention needs one
_FEW = 17  # queries, as many as may be judged: so few of a KV head are the rows of one product on a CPU


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, backend: str = AUTO) -> Tensor:
    """Each query attends to the keys up to its own, of which `window` (None: all) are the nearest. -> [B, Hq, T, D].

    backend: the kernels for attention without a window, "auto" or a name in BACKENDS.
    """
    n_tokens = q.shape[2]
    if window is not None and window < n_tokens:
        return _in_blocks(None, q, k, v, window)
    if backend == AUTO and q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if backend == AUTO:
        k, v = _repeated_if_slow(q, k, v)
    return _chosen_kernels(q, k, v, backend)


def _chosen_kernels(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Causal attention by the kernels of `backend`; where that is "auto" and cuDNN fails, by others."""
    n_tokens = q.shape[2]
    by_cudnn = _by_cudnn(backend, n_tokens, q.dtype, q.device)
    if by_cudnn:
        q, k, v = (_padded(heads) for heads in (q, k, v))
    try:
        with _kernels(backend, by_cudnn, q.device):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, :n_tokens]
    except RuntimeError as error:
        if backend != AUTO or not by_cudnn or isinstance(error, torch.OutOfMemoryError):
            raise
        _give_up_cudnn(error)
    with without_cudnn(q.device):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, :n_tokens]


def _give_up_cudnn(error: RuntimeError) -> None:
    """cuDNN raises where it cannot prepare itself for a shape, and torch then tries no other kernel: go on without."""
    global _cudnn_works
    if _cudnn_works:
        _cudnn_works = False
        _log.warning("attention goes on without cuDNN, which failed: %s", str(error).splitlines()[0])


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


def _by_cudnn(backend: str, n_tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether causal attention of so many tokens is cuDNN's."""
    long = device.type == "cuda" and dtype != torch.float32 and n_tokens >= _CUDNN_FROM
    return backend == "cudnn" or (backend == AUTO and long and _cudnn_works)


def _padded(heads: Tensor) -> Tensor:
    """[B, H, T, D] -> the same with zeros after it, up to a length that comes again. No earlier token attends to them.

    Zeros, and not what memory happens to hold: a weight of zero times NaN would be NaN.
    """
    n_tokens = heads.shape[2]
    missing = -n_tokens % _LENGTHS
    return F.pad(heads, (0, 0, 0, missing)) if missing and n_tokens < _PADDED_BELOW else heads


def _kernels(backend: str, by_cudnn: bool, device: torch.device) -> AbstractContextManager[None]:
    """Which of torch's kernels may run for causal attention."""
    if backend != AUTO:
        return sdpa_kernel(BACKENDS[backend])
    if by_cudnn:
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *_WITHOUT_CUDNN], set_priority=True)
    return without_cudnn(device)


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """For shapes that change from call to call: nothing that prepares itself for each of them."""
    return sdpa_kernel(_WITHOUT_CUDNN, set_priority=True) if device.type == "cuda" else nullcontext()


def attend_last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    live: Tensor | None = None,
    masks: CausalMasks | None = None,
) -> Tensor:
    """The queries of the last T of n entries attend causally to all entries before and to one another.

    q: [B, Hq, T, D], k and v: [B, Hkv, n, D]. live: int64 [B, Hkv, 1, 1], live entries of each head, the last T of
    them those of the queries (None: all n). window: of these each query sees only the nearest. masks: those of this
    step's other layers. -> [B, Hq, T, D].
    """
    n_new, n_entries = q.shape[2], k.shape[2]
    if live is None and window is not None and n_entries > window + n_new - 1:
        first = n_entries - window - n_new + 1
        k, v, n_entries = k[:, :, first:], v[:, :, first:], window + n_new - 1
    if n_new == 1:
        return decode_attention(q, k, v, None if live is None else _visible(live, n_entries, window))
    if live is None and n_new == n_entries:
        return causal_attention(q, k, v, window)
    if live is None and window is None and q.device.type == "cuda" and q.dtype != torch.float32:
        from torch.nn.attention.bias import causal_lower_right  # it imports torch's compiler

        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(n_new, n_entries), enable_gqa=True)
    if live is None and q.device.type == "cpu" and n_new <= _FEW:
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return of_last_tokens(rows, k, v, n_new, window, masks).view(q.shape)
    if live is None:
        return _in_blocks(n_entries - n_new, q, k, v, window)
    steps = [  # a few tokens of sequences of different lengths: one after the other
        decode_attention(q[:, :, index : index + 1], k, v, _visible(live - (n_new - 1 - index), n_entries, window))
        for index in range(n_new)
    ]
    return torch.cat(steps, dim=2)


def _visible(live: Tensor, n_entries: int, window: int | None) -> Tensor:
    """Which of n entries there are, and near enough: live int64 [B, Hkv, 1, 1] -> bool [B, Hkv, 1, n]."""
    entries = torch.arange(n_entries, device=live.device)
    visible = entries < live
    return visible if window is None else visible & (entries >= live - window)


def attend_from(indices: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention of some tokens over the keys of all: what `causal_attention` gives at these tokens.

    indices: int64 [B, n], ascending, the places of the queries q [B, Hq, n, D] among the T entries of k and v. A block
    of queries attends to the keys up to its last one, so that about half of the products are never computed.
    """
    if indices.shape[1] == 1:  # the last token, which sees everything (within the window)
        keys = slice(None) if window is None else slice(-window, None)
        return decode_attention(q, k[:, :, keys], v[:, :, keys])
    blocks = []
    for start in range(0, indices.shape[1], QUERY_BLOCK):
        part = indices[:, start : start + QUERY_BLOCK]
        end = int(part[:, -1].max()) + 1
        blocks.append(_masked(part, q[:, :, start : start + QUERY_BLOCK], k, v, 0, end, window))
    return torch.cat(blocks, dim=2)


def _in_blocks(first: int | None, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Queries that follow one another, from entry `first` on (None: the first), a block at a time under a mask."""
    blocks, offset = [], first or 0
    for start in range(0, q.shape[2], QUERY_BLOCK):
        part = q[:, :, start : start + QUERY_BLOCK]
        begin, end = offset + start, offset + start + part.shape[2]
        indices = torch.arange(begin, end, device=q.device).unsqueeze(0)
        blocks.append(_masked(indices, part, k, v, 0 if window is None else max(0, begin - window + 1), end, window))
    return torch.cat(blocks, dim=2)


def _masked(indices: Tensor, q: Tensor, k: Tensor, v: Tensor, first: int, end: int, window: int | None) -> Tensor:
    """The queries at `indices`, int64 [B or 1, n], over the keys first … end - 1: all that any of them can see."""
    queries = indices.unsqueeze(-1)
    keys = torch.arange(first, end, device=k.device)
    visible = keys <= queries  # [B or 1, n, end - first]
    if window is not None:
        visible &= keys > queries - window
    k, v = _repeated_if_slow(q, k[:, :, first:end], v[:, :, first:end], masked=True)
    with without_cudnn(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1), enable_gqa=True)


def _repeated_if_slow(q: Tensor, k: Tensor, v: Tensor, masked: bool = False) -> tuple[Tensor, Tensor]:
    """K and V for each query head where a GPU needs that: else it falls back to a kernel that holds all weights.

    On a GPU the kernels for float32 and for masks know no groups (torch 2.11).
    """
    group = q.shape[1] // k.shape[1]
    if group == 1 or q.device.type != "cuda" or not (masked or q.dtype == torch.float32):
        return k, v
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def take_tokens(attended: Tensor, indices: Tensor) -> Tensor:
    """The tokens at int64 [B, n] of attended [B, Hq, T, D]: [B, Hq, n, D]."""
    index = indices[:, None, :, None].expand(-1, attended.shape[1], -1, attended.shape[-1])
    return attended.gather(2, index)


def attend_parts(
    parts: Sequence[Part],
    q: Tensor,
    window: int | None = None,
    indices: Tensor | None = None,
    n_new: int = 0,
    masks: CausalMasks | None = None,
) -> Tensor:
    """Attention over what a layer's storage gave out, part by part: q [B, Hq, T, D] -> the same shape.

    The queries are those of the last T entries of every head; or, of the last `n_new`, those at `indices` int64 [B, T].
    masks: see attend_last.
    """
    if len(parts) == 1 and indices is None:
        part = parts[0]
        if q.shape[2] == 1 and window is None and part.live is None:  # the usual step of one token
            return decode_attention(q, part.k, part.v)
        return attend_last(q, part.k, part.v, window, part.live, masks)
    attended = torch.empty_like(q)
    group = q.shape[1] // max([part.heads.stop or part.k.shape[1] for part in parts])
    for part in parts:
        heads = part.heads if part.heads.start is None else slice(part.heads.start * group, part.heads.stop * group)
        queries = q[part.sequences, heads]
        if indices is None:
            attended[part.sequences, heads] = attend_last(queries, part.k, part.v, window, part.live, masks)
        else:
            chosen = indices[part.sequences] + (part.k.shape[2] - n_new)
            merges = window is None and q.shape[2] > 1 and why_not_merged(group, q.shape[3], q.dtype, q.device) is None
            attended[part.sequences, heads] = (
                merged_attention(chosen, queries, part.k, part.v)
                if merges
                else attend_from(chosen, queries, part.k, part.v, window)
            )
    return attended


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """One query for each head, q [B, Hq, 1, D], over all n entries k, v [B, Hkv, n, D]. -> [B, Hq, 1, D].

    visible: bool [B, Hkv or 1, 1, n], the entries to attend to (None: all). The query heads of a KV head become the
    rows of one product, so that K and V are read once.
    """
    n_rows = q.shape[1] // k.shape[1]
    rows = q.reshape(q.shape[0], k.shape[1], n_rows, q.shape[3])
    if visible is None and q.device.type == "cpu":
        return chosen_way(rows, k)[1](rows, k, v).reshape(q.shape)
    if n_rows == 1 and two_rows_are_faster(q):
        rows = rows.expand(-1, -1, 2, -1)
    with without_cudnn(q.device):
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible)
    return attended[:, :, :n_rows].reshape(q.shape)
