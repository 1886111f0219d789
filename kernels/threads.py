"""How many threads a decode step takes on a CPU. Memory may be busy with fewer than there are cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from fastkv.kernels.calibration import Way, calibration, is_on
from fastkv.kernels.products import cold_copies, product_for


def step_threads(weight: Tensor) -> int | None:
    """Threads for products of one row with matrices like this one, float [O, E]; None: as many as torch has now."""
    most = torch.get_num_threads()
    if most == 1 or weight.device.type != "cpu" or not weight.dtype.is_floating_point or not is_on():
        return None
    shape = " x ".join(map(str, weight.shape))
    what = f"threads of a step, {shape}, {str(weight.dtype).removeprefix('torch.')}"
    counts = {str(most >> halvings): most >> halvings for halvings in range(most.bit_length())}
    chosen = counts[calibration().choose(what, str(most), counts, lambda: _timed(weight, counts))]
    return None if chosen == most else chosen


@contextmanager
def as_many(threads: int | None) -> Iterator[None]:
    """Work with so many threads (None: as before)."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(weight: Tensor, counts: dict[str, int]) -> dict[str, Way]:
    """What is timed: one row with a number of matrices like this one, so that they come from memory."""
    matrices = cold_copies(weight)
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    products = {}
    for threads in counts.values():
        with as_many(threads):
            products[threads] = product_for(1, weight)

    def multiply(threads: int) -> None:
        with as_many(threads):
            for matrix in matrices:
                products[threads](x, matrix, None)

    return {name: partial(multiply, threads) for name, threads in counts.items()}
