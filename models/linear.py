"""Products with weight matrices. On a CPU in float32 oneDNN makes them, which reads the weights faster than F.linear.

torch has that product as an operator of its own compiler's: nothing promises that it stays. So it is tried once before
it is relied on, and F.linear, which is right everywhere, takes over where it is missing or disagrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (x float32 [..., E], weight [O, E], bias [O] or None) -> [..., O]
Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

# With fewer values than this a call gains little, or costs more than it gains (benchmarks/choices.py).
SMALLEST = 2**17
# oneDNN compiles a kernel for every shape that it meets and keeps it: more than half a megabyte each. So it only gets
# numbers of rows that come again and again: those of sequences that decode together, and multiples of this in a
# prefill.
MOST_TOGETHER, BLOCK = 32, 1024


class Linear(nn.Linear):
    """nn.Linear, by the faster of two ways."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Stacked(Linear):
    """Several matrices that read the same input, as one. rows: the outputs of each, stacked in this order."""

    def __init__(self, in_features: int, rows: Sequence[int], bias: bool) -> None:
        super().__init__(in_features, sum(rows), bias=bias)
        self.rows = tuple(rows)

    def part(self, x: Tensor, first: int, end: int) -> Tensor:
        """The product with the matrices first … end - 1 alone."""
        part = slice(sum(self.rows[:first]), sum(self.rows[:end]))
        return linear(x, self.weight[part], None if self.bias is None else self.bias[part])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., E], weight [O, E], bias [O] or None -> [..., O], in the dtype of all three.

    Where gradients are on it is F.linear: the other way has none.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if not on_cpu or weight.numel() < SMALLEST or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return torch.ops.fastkv.linear(x, weight, bias)
    return _multiply(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by oneDNN, for numbers of rows that are worth a kernel of their own."""
    rows = x.numel() // x.shape[-1]
    product = onednn_product() if rows <= MOST_TOGETHER or rows % BLOCK == 0 else None
    return F.linear(x, weight, bias) if product is None else product(x, weight, bias)


@cache
def onednn_product() -> Product | None:
    """oneDNN's product of float32 matrices on a CPU; None where torch has none that gives what F.linear does."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        return _as_product(operator) if _agrees(_as_product(operator)) else None
    except Exception:  # it is internal to torch: another version may raise anything
        return None


def _as_product(operator: Callable[..., Any]) -> Product:
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # It would read a bias with gaps as one without.
        return operator(x, weight, None if bias is None else bias.contiguous(), "none", [], "")

    return product


def _agrees(product: Product) -> bool:
    """Whether a small sample, of one row and of several, comes out as F.linear has it."""
    x, weight, bias = (
        torch.arange(shape.numel(), dtype=torch.float32, device="cpu").cos().view(shape)
        for shape in (torch.Size((2, 3, 32)), torch.Size((48, 32)), torch.Size((48,)))
    )
    samples = [(x[:1, 0], weight, None), (x[:, 1:], weight[16:], bias[16:])]
    with torch.inference_mode():
        return all(torch.allclose(product(*sample), F.linear(*sample), atol=1e-4) for sample in samples)


# `_multiply` as an operator of our own, which torch.compile leaves alone: it can compile oneDNN's only after it has
# packed the weights, a second copy of them.
_LIBRARY = torch.library.Library("fastkv", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("linear", _multiply, "CPU")
_LIBRARY.impl("linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), "Meta")
