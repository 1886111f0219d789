"""Products of rows with a weight matrix of 8-bit integers: W[o] = scale[o] * values[o], each output with its own scale.

Symmetric: a scale is the largest of its row's absolute values / 127, and zero stays zero. Activations are never rounded
to 8 bits: single large ones would leave few levels for the others of their row. The ways differ in how the integers
meet the activations; which one is taken is measured, as in kernels/products.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels.calibration import Way, calibration, is_on
from fastkv.kernels.products import MOST_TOGETHER, SMALLEST, cold_copies
from fastkv.kernels.tracing import GRAPH, recording

# (x [..., E], values int8 [O, E], scale float32 [O]) -> [..., O] in x's dtype
Int8Product = Callable[[Tensor, Tensor, Tensor], Tensor]

_LEVELS = 127
_ZERO = 1e-35  # no float32 divides what is smaller by _LEVELS without loss
_AT_A_TIME = 2**22  # weights that are floats at a time: 16 MiB of float32
_chosen: dict[tuple[int, torch.Size, torch.dtype, str, int], Int8Product] = {}


def floats_at_a_time() -> int:
    """Weights that are floats at a time, where the integers are not multiplied as they are."""
    return _AT_A_TIME


def shapes(n_out: int, n_in: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of the integers and of the scales of a matrix [n_out, n_in]."""
    return ((n_out, n_in), torch.int8), ((n_out,), torch.float32)


def quantise_(values: Tensor, scale: Tensor, matrix: Tensor) -> None:
    """Fill values int8 [O, E] and scale float32 [O] from a float matrix [O, E], some rows at a time."""
    rows = max(1, _AT_A_TIME // max(1, matrix.shape[1]))
    for into, factor, part in zip(values.split(rows), scale.split(rows), matrix.split(rows), strict=True):
        part = part.to(device=values.device, dtype=torch.float32)
        largest = torch.linalg.vector_norm(part, float("inf"), dim=1)
        # A row of (nearly) zeros becomes zeros. NaN stays NaN, to be seen in the logits.
        factor.copy_(torch.where(largest < _ZERO, 1.0, largest / _LEVELS))
        into.copy_((part / factor.unsqueeze(1)).round_())


def dequantised(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values int8 [..., E] and scale float32 [...] -> the matrix as floats, [..., E]."""
    return (values * scale.unsqueeze(-1)).to(dtype)


def int8_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """x [..., E], values int8 [O, E], scale float32 [O] -> [..., O] in x's dtype."""
    compiling, graph = torch.compiler.is_compiling(), recording.kind == GRAPH
    if graph or (compiling and (x.device.type != "cpu" or all(size == 1 for size in x.shape[:-1]))):
        return _compiled(x, values, scale)
    if compiling or recording.kind is not None:
        return torch.ops.fastkv.int8_product(x, values, scale)
    return _product_for(x.numel() // x.shape[-1], values, x.dtype)(x, values, scale)


def _compiled(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """What a compiler is given: of few rows on a CPU sums that it writes a loop for; else a product that widens."""
    if x.device.type != "cpu":
        return F.linear(x, dequantised(values, scale, x.dtype))
    rows = x.reshape(-1, x.shape[-1]).float()
    if x.shape[-1] % 4 == 0 and values.is_contiguous():
        words = values.view(torch.int32)
        sums = [_sums_of_words(row, words) for row in rows.unbind()]
    else:
        sums = [(values.float() * row).sum(dim=-1) for row in rows.unbind()]
    return (torch.stack(sums) * scale).to(x.dtype).view(*x.shape[:-1], len(values))


def _sums_of_words(row: Tensor, words: Tensor) -> Tensor:
    """row float32 [E] times four integers of 8 bits in each word, int32 [O, E / 4] -> sums float32 [O].

    The loops that torch's compiler writes load words many at a time, but single bytes one by one. A byte is not moved
    to the end of its word: it is 2^8, 2^16 or 2^24 times as large where it is, and its activation is as much smaller,
    which rounds nothing. The last byte has the word's sign; 128 is added to each of the others (by their highest bit),
    so that they have none, and taken off the sum again.
    """
    parts = torch.stack([row[place::4] * 2.0 ** (-8 * place) for place in range(4)])  # [4, E / 4]
    positive = words ^ 0x808080
    sums = (words & -(1 << 24)).float() * parts[3]
    for place in range(3):
        sums = sums + (positive & (0xFF << 8 * place)).float() * parts[place]
    added = sum(row[place::4].sum() for place in range(3))
    return sums.sum(dim=-1) - 128 * added


def _product_for(rows: int, values: Tensor, dtype: torch.dtype) -> Int8Product:
    """How `rows` rows of `dtype` are multiplied with int8 weights of this shape here."""
    if not 0 < rows <= MOST_TOGETHER or values.numel() < SMALLEST:
        return dequantised_product
    key = (1 if rows == 1 else MOST_TOGETHER, values.shape, dtype, values.device.type, torch.get_num_threads())
    known = _chosen.get(key)
    if known is None:
        known = _chosen[key] = _choose(key[0], values, dtype)
    return known


def _choose(rows: int, values: Tensor, dtype: torch.dtype) -> Int8Product:
    ways = ways_of(dtype, values.device.type)
    if values.device.type != "cpu" or not is_on():
        order = ("pair", "packed") if dtype == torch.float32 else ("packed", "pair")  # the first one rounds less
        return next(ways[name] for name in (*order, "dequantise") if name in ways)
    shape = " x ".join(map(str, values.shape))
    about = f"int8 product of {rows} x {values.shape[1]} with {shape}, {str(dtype).removeprefix('torch.')}"
    return ways[calibration().choose(about, "dequantise", ways, lambda: _timed(rows, values, dtype))]


def forget() -> None:
    """Choose anew when asked the next time."""
    _chosen.clear()


def _timed(rows: int, values: Tensor, dtype: torch.dtype) -> dict[str, Way]:
    """What is timed: `rows` rows with a number of matrices like this one, so that they come from memory."""
    matrices = cold_copies(values)
    x, scale = torch.ones(rows, values.shape[1], dtype=dtype), torch.ones(len(matrices[0]))

    def multiply(product: Int8Product) -> None:
        for matrix in matrices:
            product(x, matrix, scale)

    return {name: partial(multiply, way) for name, way in ways_of(dtype, "cpu").items()}


@cache
def ways_of(dtype: torch.dtype, device: str) -> dict[str, Int8Product]:
    """The ways that work here, by name: "dequantise", which always does; "packed" and "pair" where torch has them."""
    others = {"packed": _packed, "pair": _pair} if device == "cpu" else {"packed": _packed}
    return {
        "dequantise": dequantised_product,
        **{name: way for name, way in others.items() if _agrees(way, dtype, device)},
    }


def dequantised_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """As floats, some rows at a time, so that there is never a whole matrix of them. Gradients pass this way alone."""
    rows = max(1, _AT_A_TIME // values.shape[1])
    # The scale comes before the sum, which the integers alone would take beyond float16.
    pieces = zip(values.split(rows), scale.split(rows), strict=True)
    made = [F.linear(x, dequantised(*piece, x.dtype)) for piece in pieces]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _packed(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """torch's own product of bfloat16 rows with int8 weights."""
    rows = x.reshape(-1, x.shape[-1]).bfloat16()
    return torch._weight_int8pack_mm(rows, values, scale.bfloat16()).to(x.dtype).view(*x.shape[:-1], len(values))


def _pair(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """As a product of integers: each row of activations in two rows of 8 bits, the second one what the first lacks.

    So an activation has 15 bits below the largest of its row, sums are exact, and a row's result does not depend on the
    rows beside it.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    unit = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_min_(1e-30).div_(_LEVELS)
    rows = rows / unit
    coarse = rows.round()
    fine = rows.sub_(coarse).mul_(2 * _LEVELS).round_()  # the rest lies within half a unit
    sums = torch._int_mm(torch.cat((coarse, fine)).to(torch.int8), values.t()).float()
    n_rows = len(rows)
    y = sums[:n_rows].add_(sums[n_rows:], alpha=0.5 / _LEVELS).mul_(unit).mul_(scale)
    return y.to(x.dtype).view(*x.shape[:-1], len(values))


def _agrees(product: Int8Product, dtype: torch.dtype, device: str) -> bool:
    """Whether samples of one row and of several come out as they do in float32."""
    x = torch.arange(5 * 64, device=device).cos().view(5, 64).to(dtype)
    values = torch.arange(48 * 64, device=device).remainder(255).sub(127).to(torch.int8).view(48, 64)
    scale = torch.linspace(0.01, 0.02, 48, device=device)
    bound = 0.05 if product is _packed or dtype != torch.float32 else 1e-3
    try:
        with torch.inference_mode():
            expected = F.linear(x.float(), dequantised(values, scale, torch.float32))
            error = bound * expected.abs().max()
            return all(bool((product(x[:n], values, scale).float() - expected[:n]).abs().max() < error) for n in (1, 5))
    except Exception:  # operators that another version of torch lacks, or that refuse this device
        return False


_LIBRARY = torch.library.Library("fastkv", "FRAGMENT")
_LIBRARY.define("int8_product(Tensor x, Tensor values, Tensor scale) -> Tensor")
_LIBRARY.impl(
    "int8_product",
    lambda x, values, scale: _product_for(x.numel() // x.shape[-1], values, x.dtype)(x, values, scale),
    "CPU",
)
_LIBRARY.impl("int8_product", lambda x, values, scale: x.new_empty((*x.shape[:-1], values.shape[0])), "Meta")
