"""Two ways to the same answer, where a choice may hang on the rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fuzz.outcomes import UndecidedError, require
from torch import Tensor

from fastkv import LLM


def require_same(llm: LLM, one: Callable[[], Any], other: Callable[[], Any], promise: str) -> None:
    """BrokenPromiseError if they differ; UndecidedError where rounding decides it: if a little noise changes one."""
    found, expected = one(), other()
    if found == expected:
        return
    require(one() == found and other() == expected, "the same twice is the same", (found, expected))
    for seed in range(6):
        with _disturbed(llm, seed):
            if one() != found or other() != expected:
                raise UndecidedError(promise)
    require(False, promise, (found, expected))


def require_close(found: Tensor, expected: Tensor, promise: str) -> None:
    """BrokenPromiseError unless they differ by no more than rounding: 1e-4 of the largest value, or of 1."""
    if found.shape != expected.shape:
        require(False, promise, (found.shape, expected.shape))
    off = float((found - expected).abs().max()) if found.numel() else 0.0
    require(off <= 1e-4 * max(1.0, float(expected.abs().max()) if found.numel() else 0.0), promise, f"off by {off}")


@contextmanager
def _disturbed(llm: LLM, seed: int) -> Iterator[None]:
    """Weights that differ by a little more than rounding does."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(llm.model.parameters())
    before = [parameter.clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1 + 1e-5 * torch.randn(parameter.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
