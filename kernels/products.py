"""Products of rows with a float weight matrix on a CPU: the ways that torch has, and which of them is taken.

F.linear is right everywhere. oneDNN's product is an operator of torch's own compiler, and nothing promises that it
stays; so every other way is tried on a small sample first, and is out where it is missing or disagrees. Which one is
fastest depends on the CPU and on the sizes: it is measured (kernels/calibration.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels.calibration import Way, calibration, is_on
from fastkv.kernels.memory import HostMemory

# (x [..., E], weight [O, E], bias [O] or None) -> [..., O]
Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

# With fewer values than this a call gains little, or costs more than it gains (benchmarks/choices.py).
SMALLEST = 2**17
# oneDNN compiles a kernel for every shape that it meets and keeps it: more than half a megabyte each. So it only gets
# numbers of rows that come again and again: those of sequences that decode together, and multiples of this in a
# prefill.
MOST_TOGETHER, BLOCK = 32, 1024

# The number of rows that a choice is made for in place of each of the first ones.
_KINDS = [0, 1, *[4] * 3, *[8] * 4, *[MOST_TOGETHER] * (MOST_TOGETHER - 8)]
_TURNED = 4  # rows that "turned" takes at a time, of several

COLD = 64 << 20  # bytes of matrices that are read in turn while a few rows are timed: more than most caches hold
_chosen: dict[tuple[int, torch.Size, torch.dtype, int], Product] = {}


def product_for(rows: int, weight: Tensor) -> Product:
    """How `rows` rows are multiplied with a matrix of this shape and dtype here."""
    kind = _KINDS[rows] if rows <= MOST_TOGETHER else 0 if rows % BLOCK else BLOCK
    if not kind or weight.numel() < SMALLEST:
        return F.linear
    key = (kind, weight.shape, weight.dtype, torch.get_num_threads())
    known = _chosen.get(key)
    if known is None:
        known = _chosen[key] = _choose(kind, weight)
    return known


def forget() -> None:
    """Choose anew when asked the next time."""
    _chosen.clear()


def _choose(kind: int, weight: Tensor) -> Product:
    ways = ways_of(weight.dtype)
    default = "onednn" if weight.dtype == torch.float32 and "onednn" in ways else "linear"
    if kind > 1:
        ways = {name: way for name, way in ways.items() if way not in _OF_ONE and (kind < BLOCK or name != "turned")}
    if not is_on():
        return ways[default]
    shape = " x ".join(map(str, weight.shape))
    what = f"product of {kind} x {weight.shape[1]} with {shape}, {str(weight.dtype).removeprefix('torch.')}"
    return ways[calibration().choose(what, default, ways, lambda: _timed(kind, weight, ways))]


def _timed(kind: int, weight: Tensor, ways: Mapping[str, Product]) -> dict[str, Way]:
    """What is timed: `kind` rows with a number of matrices like this one; many rows take long enough with one."""
    matrices = cold_copies(weight)[: 1 if kind == BLOCK else None]
    x = torch.ones(kind, weight.shape[1], dtype=weight.dtype)

    def multiply(product: Product) -> None:
        for matrix in matrices:
            product(x, matrix, None)

    return {name: partial(multiply, way) for name, way in ways.items()}


def cold_copies(matrix: Tensor) -> list[Tensor]:
    """The matrix as often as no cache holds together, so that it is read from memory; of a large one its first rows."""
    matrix = matrix[: max(1, 2 * COLD // (matrix.shape[1] * matrix.itemsize))]
    memory, count = HostMemory(), max(1, COLD // matrix.nbytes)
    return [memory.empty(tuple(matrix.shape), matrix.dtype, matrix.device).copy_(matrix) for _ in range(count)]


@cache
def ways_of(dtype: torch.dtype) -> dict[str, Product]:
    """The ways that work here, by name. "linear" always does; "split" and "halves" are for one row alone."""
    others = {"onednn": _onednn, "turned": turned, "split": _split, "halves": _halves}
    return {"linear": F.linear, **{name: way for name, way in others.items() if _agrees(way, dtype)}}


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise.default
    # It would read a bias with gaps as one without.
    return operator(x, weight, None if bias is None else bias.contiguous(), "none", [], "")


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The matrix times the rows: other loops of the library, for a few rows such as those that judge drafted tokens.

    Four rows at a time are what these loops are best at: two or three of them take longer (benchmarks/choices.py).
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = -len(rows) % _TURNED if len(rows) > 1 else 0
    y = (weight @ (F.pad(rows, (0, 0, 0, missing)) if missing else rows).t())[:, : len(rows)]
    # In the order of memory that all other ways give: code that is compiled for one relies on it.
    y = y.t().contiguous().view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def _split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row: the outputs in two halves, as a batch of two products. MKL shares a batch between threads, no row."""
    n_out, n_in = weight.shape
    if n_out % 2 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    halves = weight.view(2, n_out // 2, n_in).transpose(1, 2)
    y = torch.bmm(x.reshape(1, 1, n_in).expand(2, 1, n_in), halves).view(*x.shape[:-1], n_out)
    return y if bias is None else y.add_(bias)


def _halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row: as `_split`, each half times the row in place of the row times each half, which are other loops."""
    n_out, n_in = weight.shape
    if n_out % 2 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    y = torch.bmm(weight.view(2, n_out // 2, n_in), x.reshape(1, n_in, 1).expand(2, n_in, 1)).view(*x.shape[:-1], n_out)
    return y if bias is None else y.add_(bias)


_OF_ONE = (_split, _halves)  # the ways of one row alone


def _agrees(product: Product, dtype: torch.dtype) -> bool:
    """Whether a small sample, of one row and of several, comes out as F.linear has it."""
    x, weight, bias = (
        torch.arange(shape.numel(), dtype=torch.float32, device="cpu").cos().view(shape).to(dtype)
        for shape in (torch.Size((2, 3, 32)), torch.Size((48, 32)), torch.Size((48,)))
    )
    samples = [(x[:1, 0], weight, None), (x[:1, 1], weight[16:], bias[16:])]
    if product not in _OF_ONE:
        samples.append((x[:, 1:], weight[16:], bias[16:]))
    bound = 1e-4 if dtype == torch.float32 else 0.1  # sums of up to 16, half a step of bfloat16 there is 0.03
    try:
        with torch.inference_mode():
            return all(torch.allclose(product(*one), F.linear(*one), rtol=0, atol=bound) for one in samples)
    except Exception:  # internal to torch: another version may raise anything
        return False
