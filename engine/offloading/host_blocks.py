"""K and V of one layer in host memory, and how they come to the device: a block at a time, the next one meanwhile.

On a GPU two buffers take turns. A stream of its own copies into one while attention reads the other: it waits until
attention is done with what the buffer held, and attention waits until the copy is there. Never run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastkv.engine.workspace import copy

Block = tuple[int, int]  # the first key, and the end


class Lanes(Protocol):
    """Who copies and who computes, and that they wait for each other. slot: 0 or 1, a buffer."""

    def begin(self) -> None:
        """Copies wait for what has been computed so far."""

    def fill(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Copy into a buffer, when it is free."""

    def use(self, slot: int) -> None:
        """What is computed from here on waits for the copy."""

    def free(self, slot: int) -> None:
        """What was computed so far was all that needed the buffer."""

    def end(self) -> None:
        """What is computed from here on waits for all copies: the buffers may go."""


class OneLane:
    """A CPU, which does one after the other."""

    def begin(self) -> None:
        pass

    def fill(self, slot: int, target: Tensor, source: Tensor) -> None:
        copy(target, source)

    def use(self, slot: int) -> None:
        pass

    def free(self, slot: int) -> None:
        pass

    def end(self) -> None:
        pass


class CudaLanes:
    """A GPU: copies run on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event(), torch.cuda.Event()]
        self._freed = [torch.cuda.Event(), torch.cuda.Event()]

    @property
    def _work(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def begin(self) -> None:
        self._copies.wait_stream(self._work)

    def fill(self, slot: int, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._freed[slot])  # which waits for nothing if it was never recorded
            copy(target, source)
            self._filled[slot].record(self._copies)

    def use(self, slot: int) -> None:
        self._work.wait_event(self._filled[slot])

    def free(self, slot: int) -> None:
        self._freed[slot].record(self._work)

    def end(self) -> None:
        self._work.wait_stream(self._copies)


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else OneLane()


def blocks_of(entries: Tensor, blocks: Sequence[Block], buffers: Sequence[Tensor], lanes: Lanes) -> Iterator[Tensor]:
    """Each block of `entries` [B, T, 2 Hkv, D] on the device, [B, s, 2 Hkv, D], valid until the next one is asked for.

    entries: on the host. buffers: two on the device, [B, S, 2 Hkv, D], of which no block needs more.
    """

    def fill(index: int) -> None:
        first, end = blocks[index]
        lanes.fill(index % 2, buffers[index % 2][:, : end - first], entries[:, first:end])

    if not blocks:
        return
    lanes.begin()
    try:
        fill(0)
        for index, (first, end) in enumerate(blocks):
            if index + 1 < len(blocks):
                fill(index + 1)
            lanes.use(index % 2)
            yield buffers[index % 2][:, : end - first]
            lanes.free(index % 2)
    finally:
        lanes.end()
