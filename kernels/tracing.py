"""Whether a function is being recorded for torch's compiler. What runs best compiled is not what runs best as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _State(threading.local):
    recording = False


_state = _State()


def is_traced() -> bool:
    """Whether what this thread computes now is recorded, by torch.compile or inside `recording`."""
    return torch.compiler.is_compiling() or _state.recording


@contextmanager
def recording() -> Iterator[None]:
    """What runs inside is recorded (engine/direct.py)."""
    before, _state.recording = _state.recording, True
    try:
        yield
    finally:
        _state.recording = before
