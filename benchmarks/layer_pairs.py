"""Parts of one layer in the old way and the new one, on random values: seconds, memory, and how far they are apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from cost import wait_for
from device_ceilings import times_of
from old_ways import copied_keys, no_padding
from torch import Tensor

from fastkv.cache.scores import window_attention
from fastkv.engine.attention import causal_attention, take_tokens
from fastkv.engine.merged_attention import merged_attention, why_not_merged
from fastkv.kernels.key_products import has_float32_products
from fastkv.models.config import ModelConfig

PASSAGE = 64  # tokens that stand together, where propagated ones do
RUNS = 3


def ways(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Which of the ways that torch may lack are taken here, and why not."""
    why = why_not_merged(config.n_heads // config.n_kv_heads, config.head_dim, dtype, device)
    return {"merged_attention": why or "yes", "float32_products": has_float32_products(dtype, device)}


def heads_of(config: ModelConfig, n_tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k and v of one prompt."""
    counts = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    return [torch.empty(1, n, n_tokens, config.head_dim, dtype=dtype, device=device).normal_() for n in counts]


def some_of(n_tokens: int, passage: int, device: torch.device) -> Tensor:
    """A fifth of the tokens by chance, `passage` of them together, and the last: int64 [1, n], ascending."""
    starts = torch.randperm(-(-n_tokens // passage), device=device)[: max(1, n_tokens // (5 * passage))] * passage
    tokens = (starts.unsqueeze(1) + torch.arange(passage, device=device)).flatten().clamp_max(n_tokens - 1)
    return torch.cat((tokens, tokens.new_tensor([n_tokens - 1]))).unique().unsqueeze(0)


@torch.inference_mode()
def tsp_attention(
    n_tokens: int, passage: int, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The attention of the TSP layer's propagated tokens: of all tokens and then gathered, or of these alone."""
    q, k, v = heads_of(config, n_tokens, device, dtype)
    indices = some_of(n_tokens, passage, device)
    some = take_tokens(q, indices)
    everything, all_s, all_peak = _measured(lambda: take_tokens(causal_attention(q, k, v), indices), device)
    figures = {"context": n_tokens, "propagated": indices.shape[1], "all_s": all_s, "all_peak_bytes": all_peak}
    why = why_not_merged(config.n_heads // config.n_kv_heads, config.head_dim, dtype, device)
    if why is not None and device.type == "cuda":
        return {**figures, "merged": why}
    alone, alone_s, alone_peak = _measured(lambda: merged_attention(indices, some, k, v), device)
    # Relative to each query's own result, which is small after many tokens.
    difference = float((alone.float() - everything.float()).norm(dim=-1).div(everything.float().norm(dim=-1)).max())
    found = {"alone_s": alone_s, "alone_peak_bytes": alone_peak, "difference": difference, "merged": why or "yes"}
    return {**figures, **found, "times_as_fast": all_s / alone_s}


@torch.inference_mode()
def window_scores(n_tokens: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Attention of a window of 8 queries, from a float32 copy of the keys, or from the keys as they are."""
    q, k, _ = heads_of(config, n_tokens, device, dtype)
    figures: dict[str, Any] = {"context": n_tokens, "float32_products": has_float32_products(dtype, device)}
    found = {}
    for name, way in (("copied", copied_keys()), ("direct", nullcontext())):
        with way:
            found[name], seconds, peak = _measured(lambda: window_attention(q, k, 8), device)
        figures |= {f"{name}_s": seconds, f"{name}_peak_bytes": peak}
    return {**figures, "difference": float((found["copied"] - found["direct"]).abs().max())}


@torch.inference_mode()
def new_lengths(n_tokens: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Causal attention by cuDNN of lengths that it has not seen, as they are and padded: milliseconds of first runs.

    Raises RuntimeError where there is no cuDNN attention.
    """
    heads = heads_of(config, n_tokens, device, dtype)
    lengths = lengths_below(n_tokens, 2 * RUNS)
    figures: dict[str, Any] = {"context": n_tokens}
    both: dict[str, tuple[AbstractContextManager[None], list[int]]] = {
        "as_it_is": (no_padding(), lengths[::2]),
        "padded": (nullcontext(), lengths[1::2]),
    }
    for name, (way, of_way) in both.items():
        with way:
            works = [partial(_by_cudnn, heads, length) for length in of_way]
            firsts = [1e3 * _first_run(work, device) for work in works]
            again = 1e3 * times_of(works[-1], device, RUNS)[0]
        figures |= {f"{name}_first_ms": firsts[-1], f"{name}_again_ms": again, f"{name}_firsts_ms": firsts}
    return figures


def _by_cudnn(heads: list[Tensor], length: int) -> Tensor:
    q, k, v = (each[:, :, :length] for each in heads)
    return causal_attention(q, k, v, backend="cudnn")


def lengths_below(n_tokens: int, count: int) -> list[int]:
    """Different lengths a little below n_tokens, which cuDNN gets as one where it gets multiples of 1,024."""
    step = max(1, n_tokens // 640)
    return [n_tokens - step * (index + 1) for index in range(count)]


def _measured(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int | None]:
    """A result, the seconds of the fastest of some runs, and the most memory of a run beside what was there."""
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    result = work()
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    return result, times_of(work, device, RUNS)[0], peak


def _first_run(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds, by the clock: what is prepared on the host counts."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started
