"""torch.compile for the parts of a layer that are many small kernels: norms, rotation, the gated product, residuals.

Each part is compiled once for all layers, and in two forms: for the one token of a decode step, and for any number.
Attention and the cache stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fastkv.errors import FastKVError
from fastkv.models.block import Block
from fastkv.models.llama import Llama


def compile_layers(model: Llama) -> None:
    """Let the blocks of `model` run compiled. Raises FastKVError where nothing can be compiled.

    The compiling itself happens at the first prefill and the first decode step, which take up to a minute.
    """
    _check_compiler(model.device)
    project, finish = _by_length(Block.project), _by_length(Block.finish_)
    for block in model.blocks:
        block.project = MethodType(project, block)  # type: ignore[method-assign]
        block.finish_ = MethodType(finish, block)  # type: ignore[method-assign]


def _by_length(part: Callable[..., Any]) -> Callable[..., Any]:
    """`part`(block, hidden [B, T, E], …), compiled for T = 1 and for other lengths apart."""
    one = torch.compile(part, dynamic=False)
    many = torch.compile(part, dynamic=True)

    def run(block: Block, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        return (one if hidden.shape[1] == 1 else many)(block, hidden, *arguments, **named)

    return run


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
