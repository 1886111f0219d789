"""Linear layers: one matrix, or several that read the same input as one, of floats or of integers of few bits.

Who multiplies is said in kernels/products.py, kernels/int8.py and kernels/int4.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv.kernels import int4, int8
from fastkv.kernels.int4 import int4_product
from fastkv.kernels.int8 import dequantised_product, int8_product
from fastkv.kernels.products import product_for, turned
from fastkv.kernels.ranks import Across
from fastkv.kernels.tracing import GRAPH, NAMES, recording


class Linear(nn.Linear):
    """nn.Linear, by the fastest of several ways.

    scale: float32 [O] where the weight is int8 [O, E], whose rows it multiplies; float16 [O, 2, E / 32] where it has
    4-bit codes, int32 [O, E / 8] (kernels/int4.py); None: the weight is floats.
    """

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.scale)

    def dense(self) -> Tensor:
        """The weight as floats, [O, E]; in float32 where it is integers."""
        if self.scale is None:
            return self.weight
        kind = int4 if self.weight.dtype == torch.int32 else int8
        return kind.dequantised(self.weight, self.scale, torch.float32)


class Summed(Across, Linear):
    """A matrix of which each rank may have some columns: what they give is summed. The bias is added once, by all."""

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks is None:
            return linear(x, self.weight, self.bias, self.scale)
        y = self.ranks.sum_(linear(x, self.weight, None, self.scale))
        return y if self.bias is None else y + self.bias


class Stacked(Linear):
    """Several matrices that read the same input, as one. rows: the outputs of each, stacked in this order."""

    def __init__(self, in_features: int, rows: Sequence[int], bias: bool) -> None:
        super().__init__(in_features, sum(rows), bias=bias)
        self.rows = tuple(rows)

    def part(self, x: Tensor, first: int, end: int) -> Tensor:
        """The product with the matrices first … end - 1 alone."""
        part = slice(sum(self.rows[:first]), sum(self.rows[:end]))
        bias, scale = (None if each is None else each[part] for each in (self.bias, self.scale))
        return linear(x, self.weight[part], bias, scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """x [..., E], weight [O, E], bias [O] or None -> [..., O], in the dtype of x.

    scale: of a weight of integers (see Linear). Where gradients are on it is F.linear, of the dequantised weight if
    need be: the other ways have none.
    """
    if scale is not None:
        if weight.dtype == torch.int32:
            y = int4_product(x, weight, scale)
        else:
            y = dequantised_product(x, weight, scale) if torch.is_grad_enabled() else int8_product(x, weight, scale)
        return y if bias is None else y + bias
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or recording.kind is not None:
        return _compiled(x, weight, bias)
    return product_for(x.numel() // x.shape[-1], weight)(x, weight, bias)


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiler is given: of one row a sum that it writes a loop for; else the product as it is.

    Compiled code that is called directly (kernels/direct.py) knows no operator of ours: the product of its few rows is
    the matrix times the rows, as in kernels/products.py.
    """
    if not torch.compiler.is_compiling() and recording.kind == NAMES:
        return torch.ops.fastkv.linear(x, weight, bias)
    if any(size != 1 for size in x.shape[:-1]):
        return turned(x, weight, bias) if recording.kind == GRAPH else torch.ops.fastkv.linear(x, weight, bias)
    y = (weight.float() * x.reshape(1, -1).float()).sum(dim=-1)
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], -1)


# The same as an operator of our own, which torch.compile leaves alone: it can compile oneDNN's only after it has packed
# the weights, a second copy of them.
_LIBRARY = torch.library.Library("fastkv", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("linear", lambda x, weight, bias: product_for(x.numel() // x.shape[-1], weight)(x, weight, bias), "CPU")
_LIBRARY.impl("linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), "Meta")
