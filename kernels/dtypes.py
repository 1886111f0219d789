"""Whether a CPU computes in a short dtype, or is faster in float32."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fastkv.kernels.calibration import Way, calibration, is_on
from fastkv.kernels.memory import zeros

_SIZE, _MATRICES, _PROMPT = 1024, 16, 256  # columns and rows of a matrix; matrices; tokens that come before a step


def faster_dtype(stored: str, has_instructions: bool) -> str:
    """ "float32", or `stored` where that is no slower; has_instructions: what decides where nothing is measured."""
    default = stored if has_instructions else "float32"
    if stored == "float32" or not is_on():
        return default
    return calibration().choose(f"float32 or {stored}", default, ("float32", stored), lambda: _timed(stored))


def _timed(stored: str) -> dict[str, Way]:
    """What is timed: some tokens of a prompt, then as many steps of one token, with matrices that come from memory."""

    def multiply(matrices: torch.Tensor) -> None:
        prompt = torch.ones(_PROMPT, _SIZE, dtype=matrices.dtype)
        F.linear(prompt, matrices[0])
        for matrix in matrices:
            F.linear(prompt[:1], matrix)

    shape = (_MATRICES, _SIZE, _SIZE)
    dtypes = {name: getattr(torch, name) for name in ("float32", stored)}
    return {name: partial(multiply, zeros(shape, dtype, torch.device("cpu"))) for name, dtype in dtypes.items()}
