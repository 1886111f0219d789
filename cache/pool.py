"""Memory for sequences: every layer's entries for a number of slots, handed out and taken back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkv.cache.layer import EntryShape, KVLayer, LayerMemory
from fastkv.cache.layer_map import Sources
from fastkv.cache.reading import ReadingLayer
from fastkv.kernels.memory import HostMemory

BLOCK = 32  # capacities are rounded up to a multiple of this many entries


def round_up(entries: int) -> int:
    """To the next multiple of BLOCK."""
    return -(-entries // BLOCK) * BLOCK


def bucket(entries: int) -> int:
    """To the next of a few lengths, eight to an octave from 256 on: at most an eighth is added."""
    step = max(BLOCK, 1 << max(0, (entries - 1).bit_length() - 4))
    return -(-entries // step) * step


def bytes_of(layout: type[KVLayer], capacities: Sequence[int], shape: EntryShape) -> int:
    """Bytes of one slot over all layers."""
    return sum(layout.bytes_of(capacity, shape) for capacity in capacities)


class KVPool:
    """L layers of one layout, with room for `n_slots` sequences.

    lengths: int64 [L, S, Hkv], live entries of each head. starts: int64 [L, S, Hkv], where they begin, in the rows
    of a layer (KVLayer.flat) counted from the slot's first one. next_position: int64 [S], of the next token.
    appended: the host's count of the tokens that decode steps have added to each slot since its prefill.
    shared: of each layer the one whose entries it reads, itself or an earlier one; () where none reads another. Readers
    have a capacity of 0; what `lengths` says of them means nothing.
    All tensors keep their addresses for as long as the pool lives.
    """

    def __init__(
        self,
        layout: type[KVLayer],
        capacities: Sequence[int],
        n_slots: int,
        shape: EntryShape,
        device: torch.device,
        shared: Sources = (),
    ) -> None:
        self.layout, self.capacities, self.shape, self.shared = layout, list(capacities), shape, shared
        self.n_slots, self.device = n_slots, device
        size = (len(capacities), n_slots, shape.n_kv_heads)
        even = [[head * capacity for head in range(shape.n_kv_heads)] for capacity in capacities]
        self.appended = [0] * n_slots
        with torch.inference_mode(False):  # memory made in that mode could be written in that mode only
            self.lengths = torch.zeros(size, dtype=torch.int64, device=device)
            self.starts = torch.tensor(even, dtype=torch.int64, device=device).unsqueeze(1).repeat(1, n_slots, 1)
            self.next_position = torch.zeros(n_slots, dtype=torch.int64, device=device)
            self.layers: list[KVLayer] = []
            host = HostMemory(self.nbytes)
            for index, capacity in enumerate(capacities):
                if self.source(index) != index:
                    self.layers.append(ReadingLayer(self.layers[self.source(index)]))
                    continue
                before = self.layers[-1] if self.layers else None
                counts = (self.lengths[index], self.starts[index], self.appended)
                self.layers.append(layout(LayerMemory(capacity, shape, *counts, before, capacities, host)))
        self._free = list(range(n_slots - 1, -1, -1))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.n_slots * bytes_of(self.layout, self.capacities, self.shape)

    @property
    def is_free(self) -> bool:
        """Whether no sequence has a slot."""
        return len(self._free) == self.n_slots

    def take(self) -> int:
        """A free slot: the lowest one that there is, so that those in use stay neighbours."""
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def take_all(self) -> range:
        """Every slot of a new pool, for sequences that are always worked on together."""
        self._free = []
        return range(self.n_slots)

    def release(self, slots: range) -> None:
        """The sequences of these slots are done: nothing of them is left for those that come."""
        self.reset(slots, 0)
        self._free += slots

    def reset(self, slots: range, position: int) -> None:
        """No entries, and the next token at `position`."""
        for layer in self.layers:
            layer.clear(slots)
        for slot in slots:
            self.appended[slot] = 0
        self.next_position[slots.start : slots.stop].fill_(position)

    def source(self, layer: int) -> int:
        """The layer whose entries it reads."""
        return self.shared[layer] if self.shared else layer

    def holds(self, layout: type[KVLayer], capacities: Sequence[int], n_slots: int) -> bool:
        """Whether sequences of that size find room here."""
        return (
            layout is self.layout
            and n_slots <= self.n_slots
            and all(wanted <= there for wanted, there in zip(capacities, self.capacities, strict=True))
        )

    def places(self, slots: range, count: int) -> Tensor:
        """Where the next `count` entries of each head belong: int64 [L, B, Hkv, count]. Once a step for all layers."""
        part = slice(slots.start, slots.stop)
        ends = (self.starts[:, part] + self.lengths[:, part]).unsqueeze(3)
        return ends if count == 1 else ends + torch.arange(count, device=self.device)

    def places_in(self, layer: int, slots: range, count: int) -> Tensor:
        """The same of one layer: int64 [B, Hkv, count]."""
        part = slice(slots.start, slots.stop)
        ends = (self.starts[layer, part] + self.lengths[layer, part]).unsqueeze(2)
        return ends + torch.arange(count, device=self.device)

    def advance(self, slots: range, count: int, on_device: bool = True) -> None:
        """End a step: every layer has appended `count` tokens to each of these slots.

        on_device: False where a graph has counted there itself.
        """
        for slot in slots:
            self.appended[slot] += count
        if on_device:
            part = slice(slots.start, slots.stop)
            self.lengths[:, part] += count
            self.next_position[part] += count
