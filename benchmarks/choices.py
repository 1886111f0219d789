"""What the choices of the engine are made by: who multiplies, who attends at the TSP layer, how many queries score at a
time where all do, what one query costs where no group shares a KV head.

    python benchmarks/choices.py

Prints medians for this machine's CPU. Who multiplies is measured where the engine runs (kernels/products.py). Where
another machine disagrees with the rest, `_propagated_only_pays` (engine/prefill.py), `two_rows_are_faster`
(kernels/row_attention.py), `_BLOCK_VALUES` and `_LEAST_QUERIES` (cache/scores.py) are where the choice is made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F

from fastkv.cache import scores
from fastkv.engine.attention import attend_from, causal_attention, take_tokens
from fastkv.kernels.memory import HostMemory, zeros
from fastkv.kernels.products import Product, ways_of
from fastkv.models.linear import linear

# Rows, columns: matrices of the 100M preset, then smaller ones, where a call begins to cost more than it gains.
SHAPES = ((4096, 768), (768, 2048), (1280, 768), (32_000, 768), (512, 256), (256, 256), (128, 128))
FEW, MANY = (1, 2, 4, 8, 32), 4096  # rows of input: of sequences that decode together, and of a prefill's chunk
BYTES = 2**28  # of matrices that no cache holds together
TOKENS, PROPAGATED = 8192, 1638
HEADS, KV_HEADS, HEAD_DIM = 12, 4, 64

# A vector in huge pages, and one in memory as torch gives it: reading them is what memory gives.
READ: dict[str, torch.Tensor] = {}


def median(work: Callable[[], object], runs: int) -> float:
    """Seconds, after one run that is not counted."""
    times = []
    for counted in range(-1, runs):
        started = time.perf_counter()
        work()
        if counted >= 0:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def multiply(product: Product, x: torch.Tensor, matrices: list[torch.Tensor]) -> None:
    """x times each."""
    for matrix in matrices:
        product(x, matrix, None)


def products(dtype: torch.dtype) -> None:
    """How fast a few rows are multiplied with many matrices, and many rows with one, each way."""
    for rows, columns in SHAPES:
        memory, count = HostMemory(), max(1, BYTES // (dtype.itemsize * rows * columns))
        matrices = [
            memory.empty((rows, columns), dtype, torch.device("cpu")).copy_(torch.randn(rows, columns))
            for _ in range(count)
        ]
        for n in FEW:
            work = sum(matrix.nbytes for matrix in matrices)
            compare(torch.randn(n, columns).to(dtype), matrices, work, "GB/s")
        if rows <= MANY:  # the head only ever sees the last tokens
            compare(torch.randn(MANY, columns).to(dtype), matrices[:1], 2 * MANY * rows * columns, "GFLOP/s")


def compare(x: torch.Tensor, matrices: list[torch.Tensor], work: int, unit: str) -> None:
    """Print how fast x times each of the matrices, `work` in all, is made each way; of one row, beside memory's speed.

    All in turn: what memory gives on a machine that others share changes within seconds.
    """
    ways = {name: partial(multiply, way, x, matrices) for name, way in ways_of(x.dtype).items()}
    about = f"{str(x.dtype).removeprefix('torch.')} {len(x)} x {list(matrices[0].shape)}"
    if len(x) > 1:
        ways = {name: way for name, way in ways.items() if name not in ("split", "halves")}
        speeds = {name: work / 1e9 / seconds for name, seconds in medians(ways, 15).items()}
        print(f"{about}: {', '.join(f'{name} {speed:.1f} {unit}' for name, speed in speeds.items())}")
        return
    compiled = compiled_product()
    if compiled is not None:
        ways["compiled"] = partial(multiply, compiled, x, matrices)
    for name, vector in READ.items():
        ways[name] = partial(torch.dot, vector, vector)
    speeds = {name: (BYTES if name in READ else work) / 1e9 / taken for name, taken in medians(ways, 15).items()}
    limit = speeds["memory"]
    print(f"{about}: {', '.join(f'{name} {speed:.1f} ({speed / limit:.0%})' for name, speed in speeds.items())} {unit}")


def medians(ways: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Seconds of each, all of them in turn, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + runs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def compiled_product() -> Product | None:
    """One row as torch.compile multiplies it; None where it does not work."""
    torch.compiler.reset()  # it compiles one function for a few shapes only

    @partial(torch.compile, dynamic=False, fullgraph=True)
    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, weight, bias)

    try:
        product(torch.ones(1, 8), torch.ones(4, 8), None)
    except Exception:  # whatever the compiler raises
        return None
    return product


def propagated(dtype: torch.dtype) -> None:
    """Seconds of the TSP layer's attention for propagated tokens: of all tokens and then gathered, or of them alone."""
    q = torch.randn(1, HEADS, TOKENS, HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, KV_HEADS, TOKENS, HEAD_DIM).to(dtype) for _ in range(2))
    indices = torch.randperm(TOKENS)[:PROPAGATED].sort().values.unsqueeze(0)
    some = take_tokens(q, indices)
    everything = median(lambda: take_tokens(causal_attention(q, k, v), indices), 3)
    alone = median(lambda: attend_from(indices, some, k, v), 3)
    print(f"{dtype} {PROPAGATED} of {TOKENS} tokens: all attend {everything:.2f} s, propagated alone {alone:.2f} s")


def all_queries_score() -> None:
    """Seconds in which all queries of a layer score its tokens, with blocks of several sizes."""
    for tokens in (TOKENS // 4, TOKENS):
        q, k = (torch.randn(1, heads, tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS))
        for queries in (4, 16, 42, 128, 512):
            block = patch.dict(scores._BLOCK_VALUES, cpu=queries * HEADS * tokens)
            with block, patch.object(scores, "_LEAST_QUERIES", 1):
                seconds = median(partial(scores.received_attention, q, k), 3)
            weights = queries * HEADS * tokens / 2**20
            print(f"{tokens} tokens, all score, {queries} at a time, {weights:.1f} Mi weights: {seconds:.3f} s")


def one_row(dtype: torch.dtype) -> None:
    """Milliseconds of one decode step's attention in a layer without groups, the one query given once or twice."""
    q = torch.randn(1, HEADS, 1, HEAD_DIM).to(dtype)
    k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM).to(dtype) for _ in range(2))
    once, twice = (
        1e3 * median(partial(F.scaled_dot_product_attention, q.expand(-1, -1, rows, -1), k, v), 15) for rows in (1, 2)
    )
    print(f"{dtype} {TOKENS} entries, one query for each head: once {once:.2f} ms, twice {twice:.2f} ms")


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    READ["memory"] = zeros((BYTES // 4,), torch.float32, torch.device("cpu")).fill_(1)
    READ["plain memory"] = torch.ones(BYTES // 4)
    for kind in (torch.float32, torch.bfloat16):
        products(kind)
    for kind in (torch.float32, torch.bfloat16):
        propagated(kind)
    all_queries_score()
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        one_row(kind)


if __name__ == "__main__":
    main()
