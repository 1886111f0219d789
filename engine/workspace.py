"""Memory that requests hand to one another: the prefill's activations, the KV slots, and the graphs bound to them."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkv.cache.storage import KVStorage

if TYPE_CHECKING:
    from fastkv.engine.graph import GraphDecoder


class Workspace:
    """Buffers by name that only ever grow. What `take` returns is valid until the name is taken again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of that shape with the dtype and device of `like`; what it holds is left over from before."""
        count = math.prod(shape)
        known = self._buffers.get(name)
        if known is None or known.numel() < count:
            del known
            self._buffers.pop(name, None)  # the old one goes before the new one comes
            self._buffers[name] = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._buffers[name][:count].view(shape)


class Buffers:
    """All that one running request needs and the next one can use again."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.storage: KVStorage | None = None
        self.decoder: GraphDecoder | None = None

    @property
    def nbytes(self) -> int:
        return self.workspace.nbytes + (self.storage.nbytes if self.storage is not None else 0)

    def storage_for(
        self, capacities: list[int], batch: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> KVStorage:
        """Slots for `batch` texts and at least `capacities` entries of each layer: those there are, or larger ones.

        heads: (KV heads, head dim).
        """
        known = self.storage
        if known is not None and known.holds(capacities, batch):
            return known
        if known is not None and batch == known.batch:  # texts grow longer: be ready for both
            capacities = [max(pair) for pair in zip(capacities, known.capacities, strict=True)]
        del known
        self.decoder = self.storage = None  # the old slots go first, and with them the graphs that are bound to them
        self.storage = KVStorage.allocate(capacities, batch, *heads, dtype=dtype, device=device)
        return self.storage


class BufferPool:
    """The buffers that no request is using. One set is kept: requests usually come one after another."""

    def __init__(self) -> None:
        self._idle: Buffers | None = None
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        """What the next request can use without asking the system for it."""
        idle = self._idle
        return idle.nbytes if idle is not None else 0

    def lease(self) -> Buffers:
        """Buffers for one request alone. Whoever runs beside another gets new ones."""
        with self._lock:
            buffers, self._idle = self._idle, None
        return Buffers() if buffers is None else buffers

    def give_back(self, buffers: Buffers) -> None:
        """Keep them for the next request; of two sets, the larger."""
        with self._lock:
            if self._idle is None or self._idle.nbytes <= buffers.nbytes:
                self._idle = buffers

    def clear(self) -> None:
        """Let the idle memory go."""
        with self._lock:
            self._idle = None
