"""What this machine could do: the other half of the cost model in engine/cost.py.

A ceiling is not a promise. It says how much of the time measured is explained by products (prefill) or by reading
weights and cache (decode), and how much is left to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastkv.kernels.memory import zeros
from fastkv.models.linear import linear


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: products in FLOP/s, reading memory in bytes/s."""

    flops: float
    bandwidth: float


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several large products, and of several passes over more memory than any cache holds."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2.0 * size**3 / min(_best(lambda: a @ b, device), _best(lambda: linear(a, b, None), device))
    # Read as decoding reads: one row times a large matrix, stored by rows or by columns, whichever is faster here.
    values = (2**32 if device.type == "cuda" else 2**29) // dtype.itemsize
    matrix = zeros((values // 4096, 4096), dtype, device).fill_(1)
    row = torch.ones(1, 4096, dtype=dtype, device=device)
    by_rows = _best(lambda: linear(row, matrix, None), device)
    turned = matrix.view(4096, -1)
    by_columns = _best(lambda: row @ turned, device)
    # On a CPU products may be far from what memory gives: there, also as one long vector.
    vector = matrix.view(-1).view(torch.float32)
    as_vector = _best(lambda: torch.dot(vector, vector), device) if device.type == "cpu" else by_rows
    return Ceilings(flops, matrix.nbytes / min(by_rows, by_columns, as_vector))


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(work: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return min(times)
