"""Whether a function is being recorded rather than run: what is best for a compiler is not what is best as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["graph", "names"]
GRAPH: Kind = "graph"
NAMES: Kind = "names"


class _Recording(threading.local):
    """What is recorded in this thread, besides what torch.compile records. (torch.compile cannot follow this class.)

    GRAPH: for a compiler; sizes may be symbols. NAMES: by name alone; products are operators of our own, whatever
    computes them here. None: nothing.
    """

    kind: Kind | None = None


recording = _Recording()


@contextmanager
def recorded_as(kind: Kind) -> Iterator[None]:
    """What runs inside is recorded so."""
    before, recording.kind = recording.kind, kind
    try:
        yield
    finally:
        recording.kind = before


def fix(place: int, size: int, *tensors: Tensor) -> None:
    """Tell the compiler a size, which it would leave open: how many heads there are, or tokens."""
    if recording.kind == GRAPH:
        for each in tensors:
            torch._check(each.shape[place] == size)
