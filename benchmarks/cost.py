"""The cost model: what a prefill must compute and a decode step must read, and what this machine could do.

A ceiling is not a promise. It says how much of the time measured is explained by products (prefill) or by reading
weights and cache (decode), and how much is left to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastkv.cache.policy import LayerPlan
from fastkv.models.config import ModelConfig


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: products in FLOP/s, reading memory in bytes/s."""

    flops: float
    bandwidth: float


def layer_weights(config: ModelConfig) -> tuple[int, int, int]:
    """Values in the matrices of one layer: (k and v; q and o; MLP)."""
    keys = 2 * config.n_kv_heads * config.head_dim * config.hidden_size
    queries = 2 * config.n_heads * config.head_dim * config.hidden_size
    return keys, queries, 3 * config.hidden_size * config.intermediate_size


def prefill_flops(config: ModelConfig, plans: list[LayerPlan], batch: int = 1) -> float:
    """Operations that a prefill of `batch` prompts cannot avoid, a multiply-add being two of them.

    K and V for every token that a layer sees; queries, attention, output and MLP for every token that leaves it, which
    is one token at the last layer. A token attends to half of what the layer saw, on average over the tokens.
    """
    keys, queries, mlp = layer_weights(config)
    total = 2.0 * config.vocab_size * config.hidden_size
    for layer, plan in enumerate(plans):
        last = layer == len(plans) - 1
        leaving = 1 if last else plan.propagated or plan.seen
        attended = plan.seen if last else plan.seen / 2
        total += 2.0 * plan.seen * keys + 2.0 * leaving * (queries + mlp)
        total += 4.0 * leaving * attended * config.n_heads * config.head_dim
    return batch * total


def decode_bytes(
    config: ModelConfig, plans: list[LayerPlan], new_tokens: float, itemsize: int, batch: int = 1
) -> float:
    """Bytes that one decode step of `batch` texts reads when `new_tokens` have been appended to each.

    All matrices once, whatever the batch is, and the live cache of every text.
    """
    weights = config.n_layers * sum(layer_weights(config)) + config.vocab_size * config.hidden_size
    entries = batch * sum(plan.kept + new_tokens for plan in plans)
    return itemsize * (weights + 2 * entries * config.n_kv_heads * config.head_dim)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several large products, and of several passes over more memory than any cache holds."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2.0 * size**3 / _best(lambda: a @ b, device)
    # Read as decoding reads: one row times a large matrix, stored by rows or by columns, whichever is faster here.
    values = (2**32 if device.type == "cuda" else 2**29) // dtype.itemsize
    matrix = torch.ones(values // 4096, 4096, dtype=dtype, device=device)
    row = torch.ones(1, 4096, dtype=dtype, device=device)
    by_rows = _best(lambda: F.linear(row, matrix), device)
    turned = matrix.view(4096, -1)
    by_columns = _best(lambda: row @ turned, device)
    return Ceilings(flops, matrix.nbytes / min(by_rows, by_columns))


def _best(work: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return min(times)
