"""Conditions on the sizes of tensors, as torch's compiler states them: `2 <= L['t0'].size()[1] and ...`.

They are read into functions of Python's own, and nothing in them is executed: only what stands below is understood.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_Term = Callable[[Sequence[Tensor]], Any]

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of inputs that code holds for.

    open: by place of an input its shape and strides, None where they are open. condition: on all of these. The other
    inputs are as they were recorded.
    """

    open: dict[int, list[int | None]]
    condition: str | None


def read_condition(text: str | None) -> Callable[[Sequence[Tensor]], bool]:
    """Whether tensors t0, t1, ... meet a condition; None: any do. Raises ValueError for what is not understood."""
    if text is None:
        return lambda tensors: True
    try:
        term = _read(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"not understood: {text}") from None
    return lambda tensors: bool(term(tensors))


def _read(node: ast.expr) -> _Term:
    match node:
        case ast.Constant(value=int() as value):
            return lambda tensors: value
        case ast.BoolOp(op=joined, values=values):
            terms = [_read(each) for each in values]
            together = all if isinstance(joined, ast.And) else any
            return lambda tensors: together(term(tensors) for term in terms)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _read(operand)
            return lambda tensors: not inner(tensors)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _pair(op, left, right)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _pair(op, left, right)
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=tensor, attr=name)), slice=ast.Constant(value=index)
        ):
            return _size(_place(tensor), name, index)
    raise ValueError(f"not understood: {ast.unparse(node)}")


def _pair(op: ast.AST, left: ast.expr, right: ast.expr) -> _Term:
    function, first, second = _OPERATORS[type(op)], _read(left), _read(right)
    return lambda tensors: function(first(tensors), second(tensors))


def _size(place: int, name: str, index: Any) -> _Term:
    if name == "size":
        return lambda tensors: tensors[place].shape[index]
    if name == "stride":
        return lambda tensors: tensors[place].stride()[index]
    raise ValueError(f"not understood: {name}")


def _place(node: ast.expr) -> int:
    """L['t2'] -> 2."""
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str() as name)) if name[:1] == "t":
            return int(name[1:])
    raise ValueError(f"not understood: {ast.unparse(node)}")
