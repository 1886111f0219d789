"""Whether a function is being recorded rather than run: what is best for a compiler is not what is best as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _State(threading.local):
    tracing = naming = False


_state = _State()


def is_traced() -> bool:
    """Whether what this thread computes now is recorded, by torch.compile or inside `tracing` or `naming`."""
    return torch.compiler.is_compiling() or _state.tracing or _state.naming


def is_named() -> bool:
    """Whether it is recorded inside `naming`."""
    return not torch.compiler.is_compiling() and _state.naming


def is_symbolic() -> bool:
    """Whether it is recorded inside `tracing`, where sizes may be symbols."""
    return not torch.compiler.is_compiling() and _state.tracing


@contextmanager
def tracing() -> Iterator[None]:
    """What runs inside is recorded for a compiler."""
    before, _state.tracing = _state.tracing, True
    try:
        yield
    finally:
        _state.tracing = before


@contextmanager
def naming() -> Iterator[None]:
    """What runs inside is recorded by name alone: products are operators of our own, whatever computes them here."""
    before, _state.naming = _state.naming, True
    try:
        yield
    finally:
        _state.naming = before
