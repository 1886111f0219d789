"""What one device can do at most, kernel by kernel: copies, products, matrix-vector products, causal attention.

Values are random: a GPU multiplies and copies zeros and ones faster than anything that a model holds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cost import wait_for
from torch.nn.attention import sdpa_kernel

from fastkv.engine.attention import BACKENDS
from fastkv.models.config import ModelConfig


def times_of(work: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Seconds of each run, fastest first, after one that is not counted. On a GPU by its own clock."""
    seconds = []
    for counted in range(-1, runs):
        taken = _by_events(work) if device.type == "cuda" else _by_clock(work)
        if counted >= 0:
            seconds.append(taken)
    return sorted(seconds)


def _by_events(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _by_clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def copy_bandwidth(device: torch.device) -> dict[str, Any]:
    """Bytes/s of a copy on the device: those read and those written, both counted. Best of 10."""
    source = torch.empty(2 ** (29 if device.type == "cuda" else 22), dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    seconds = times_of(lambda: target.copy_(source), device, 10)
    return {"bytes_per_s": 2 * source.nbytes / seconds[0], "median_bytes_per_s": 2 * source.nbytes / seconds[5]}


@torch.inference_mode()
def product_speed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """FLOP/s of a large square product. Best of 10, and the median."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = times_of(lambda: a @ b, device, 10)
    return {"size": size, "flops_per_s": 2 * size**3 / seconds[0], "median_flops_per_s": 2 * size**3 / seconds[5]}


def matrices_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of what a decode step multiplies one token with: a layer's four matrices, and the head."""
    rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    inner = config.intermediate_size
    return {
        "q, k, v": (rows, config.hidden_size),
        "output": (config.hidden_size, config.n_heads * config.head_dim),
        "gate, up": (2 * inner, config.hidden_size),
        "down": (config.hidden_size, inner),
        "head": (config.vocab_size, config.hidden_size),
    }


@torch.inference_mode()
def matrix_vector(shape: tuple[int, int], device: torch.device, dtype: torch.dtype, copy: float | None) -> Any:
    """Bytes/s at which F.linear reads row-major matrices for one token, and its share of the copy's (None: unknown).

    As many matrices as no cache holds, one after the other, replayed as a graph where there are graphs.
    """
    rows, columns = shape
    size = rows * columns * dtype.itemsize
    count = max(1, (2 ** (31 if device.type == "cuda" else 24)) // size)
    weights = [torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(count)]
    token = torch.randn(1, columns, device=device).to(dtype)

    def multiply() -> None:
        for weight in weights:
            F.linear(token, weight)

    work = _replayed(multiply) if device.type == "cuda" else multiply
    speed = count * size / times_of(work, device, 7)[0]
    figures = {"rows": rows, "columns": columns, "matrices": count, "bytes_per_s": speed}
    return figures if copy is None else {**figures, "of_copy": speed / copy}


def _replayed(work: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def attention_speed(
    backend: str, n_tokens: int, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """FLOP/s of causal attention, half of the square counted; seconds of the first run, in which plans are made.

    Raises RuntimeError with what torch said about the kernel, where it cannot be used.
    """
    shapes = [(1, heads, n_tokens, config.head_dim) for heads in (config.n_heads, *[config.n_kv_heads] * 2)]
    q, k, v = (torch.empty(shape, dtype=dtype, device=device).normal_() for shape in shapes)

    def attend() -> None:
        with sdpa_kernel(BACKENDS[backend]):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wait_for(device)
        started = time.perf_counter()
        try:
            attend()
        except RuntimeError as error:
            reasons = [str(error).splitlines()[0], *(str(each.message).splitlines()[0] for each in said)]
            raise RuntimeError("; ".join(reasons)) from None
        wait_for(device)
    first = time.perf_counter() - started
    seconds = times_of(attend, device, 2 if n_tokens > 65_536 else 5)[0]
    flops = 2.0 * n_tokens**2 * config.n_heads * config.head_dim
    return {"flops_per_s": flops / seconds, "seconds": seconds, "first_run_s": first}
