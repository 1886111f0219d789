"""The choices that the engine makes by what was measured: how a matrix lies in memory, who attends at the TSP layer.

    python benchmarks/choices.py

Prints medians for this machine's CPU. Where another machine disagrees, `_reads_faster_by_columns` (models/weights.py)
and `_narrow_pays` (engine/prefill.py) are where the choice is made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from fastkv.engine.attention import attend_from, causal_attention, take_rows

SHAPES = ((4096, 768), (768, 2048), (1280, 768), (32_000, 768))  # rows, columns: those of the 100M preset
TOKENS, SURVIVORS = 8192, 1638
HEADS, KV_HEADS, HEAD_DIM = 12, 4, 64


def median(work: Callable[[], object], runs: int) -> float:
    """Seconds, behind one run that is not counted."""
    times = []
    for counted in range(-1, runs):
        started = time.perf_counter()
        work()
        if counted >= 0:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def multiply(matrices: list[torch.Tensor]) -> None:
    """One row times each."""
    row = matrices[0].new_ones(1, matrices[0].shape[1])
    for matrix in matrices:
        F.linear(row, matrix)


def layouts(dtype: torch.dtype) -> None:
    """GB/s at which one row is multiplied with matrices that no cache holds together."""
    for rows, columns in SHAPES:
        count = max(1, 2**28 // (rows * columns * dtype.itemsize))
        by_rows = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
        by_columns = [matrix.t().contiguous().t() for matrix in by_rows]
        size = count * by_rows[0].nbytes / 1e9
        speeds = [size / median(partial(multiply, stored), 15) for stored in (by_rows, by_columns)]
        print(f"{dtype} [{rows}, {columns}]: by rows {speeds[0]:.1f} GB/s, by columns {speeds[1]:.1f} GB/s")


def survivors(dtype: torch.dtype) -> None:
    """Seconds of one layer's attention for the survivors of TSP: of all tokens and then gathered, or of them alone."""
    q = torch.randn(1, HEADS, TOKENS, HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, KV_HEADS, TOKENS, HEAD_DIM).to(dtype) for _ in range(2))
    rows = torch.randperm(TOKENS)[:SURVIVORS].sort().values.unsqueeze(0)
    some = take_rows(q, rows)
    everybody = median(lambda: take_rows(causal_attention(q, k, v), rows), 3)
    alone = median(lambda: attend_from(rows, some, k, v), 3)
    print(f"{dtype} {SURVIVORS} of {TOKENS} tokens: all attend {everybody:.2f} s, survivors alone {alone:.2f} s")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for kind in (torch.float32, torch.bfloat16):
        layouts(kind)
        survivors(kind)
