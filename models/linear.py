"""Linear layers: one matrix, or several that read the same input as one. Who multiplies is kernels/products.py's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv.kernels.products import product_for


class Linear(nn.Linear):
    """nn.Linear, by the fastest of several ways."""

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

    Where gradients are on it is F.linear: the other ways have none.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return _compiled(x, weight, bias)
    return product_for(x.numel() // x.shape[-1], weight)(x, weight, bias)


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch.compile is given: of one row a sum that it writes a loop for; else the product as it is."""
    if any(size != 1 for size in x.shape[:-1]):
        return torch.ops.fastkv.linear(x, weight, bias)
    y = (weight.float() * x.reshape(1, -1).float()).sum(dim=-1)
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], -1)


# The same as an operator of our own, which torch.compile leaves alone: it can compile oneDNN's only after it has packed
# the weights, a second copy of them.
_LIBRARY = torch.library.Library("fastkv", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("linear", lambda x, weight, bias: product_for(x.numel() // x.shape[-1], weight)(x, weight, bias), "CPU")
_LIBRARY.impl("linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), "Meta")
