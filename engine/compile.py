"""torch.compile for what a layer computes outside its attention: norms, rotation, products, residuals.

On a GPU a prefill takes a layer in two parts, before and after attention. A decode step takes what lies between two
attentions as one: the end of a layer and the beginning of the next. Each part is compiled once for all layers.
Attention and the cache stay as they are. A single row on a CPU goes its own way (engine/compiled_row.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from fastkv.engine.compiled_row import CompiledRow
from fastkv.errors import FastKVError
from fastkv.kernels.kept_code import anything_kept
from fastkv.models.block import Block
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama

# Of the compiler for one row on a CPU: what is made of more than two tensors is written down. Else the norm before a
# product would be a part of it, and be computed anew for each of its outputs.
ONE_ROW = {"realize_acc_reads_threshold": 2}

_log = logging.getLogger(__name__)

_Heads = tuple[Tensor, Tensor, Tensor]  # q, k and v


def compile_layers(model: Llama) -> None:
    """Let `model` run compiled. Raises FastKVError where nothing can be compiled, and no compiled code is kept.

    The compiling itself happens at the first prefill and the first decode step, which take up to a minute. On a CPU
    decode steps alone are compiled, those of a single sequence by `model.row.prepare`.
    """
    on_cpu = model.device.type == "cpu"
    if not (on_cpu and anything_kept()):
        _check_compiler(model.device)
    if not on_cpu:  # there a prefill gains little, and each process would import and trace for seconds
        project, finish = (torch.compile(_apart(part), dynamic=True) for part in (Block.project, Block.finish_))
        for block in model.blocks:
            block.project = MethodType(project, block)  # type: ignore[method-assign]
            block.finish_ = MethodType(finish, block)  # type: ignore[method-assign]
    blocks = model.blocks
    between, last = (_by_rows(part, model.device) for part in (_between, _last))
    model.between = lambda layer, hidden, attended, rope: between(  # type: ignore[method-assign]
        hidden, blocks[layer], blocks[layer + 1], attended, rope
    )
    model.last = lambda hidden, attended: last(hidden, model, attended)  # type: ignore[method-assign]
    if on_cpu:
        model.row = CompiledRow(model, ONE_ROW)


def _between(hidden: Tensor, block: Block, after: Block, attended: Tensor, rope: Rope) -> _Heads:
    type(block).finish_(block, hidden, attended)
    return type(after).project(after, hidden, rope)


def _last(hidden: Tensor, model: Llama, attended: Tensor) -> Tensor:
    block = model.blocks[-1]
    type(block).finish_(block, hidden, attended)
    return model.head(hidden)


def _by_rows(part: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`part`(hidden [B, T, E], …), compiled for one row, the step of a single sequence, and for any number apart.

    Not before it is called: to import torch's compiler takes seconds.
    """

    @cache
    def compiled(of_one: bool) -> Callable[..., Any]:
        try:
            _check_compiler(device)
        except FastKVError as error:  # found out so late where compiled code was kept
            _warn_once(f"going on without: {error}")
            return part
        if of_one:
            return torch.compile(_apart(part), dynamic=False)  # on a GPU; a CPU has model.row
        return torch.compile(_apart(part), dynamic=True)

    def run(hidden: Tensor, *arguments: Any) -> Any:
        return compiled(hidden.shape[0] == hidden.shape[1] == 1)(hidden, *arguments)

    return run


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _apart(part: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: torch.compile counts what it has compiled by code, up to a limit."""
    assert isinstance(part, FunctionType)
    copy = FunctionType(part.__code__.replace(), part.__globals__, part.__name__, part.__defaults__, part.__closure__)
    copy.__kwdefaults__ = part.__kwdefaults__
    return copy


def _check_compiler(device: torch.device) -> None:
    """Compile something small now, so that a missing compiler is one line before the model is used."""

    def small(x: Tensor) -> Tensor:
        return torch.relu(2 * x + 1)

    try:
        torch.compile(small)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler and the tools around it raise
        needed = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FastKVError(
            f"torch.compile does not work here: it needs {needed} ({reason}); leave it out", setting="compile"
        ) from None
