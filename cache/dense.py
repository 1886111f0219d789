"""The plain layout: all heads of a sequence are equally long, and lie in [S, Hkv, C, D]."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastkv.cache.layer import EntryShape, Kept, LayerMemory, Part

# One call may read up to this many times the live entries of its sequences; beyond it, a call for each sequence is
# faster (on a CPU).
_WASTE = 1.25


def new_memory(memory: LayerMemory, capacity: int) -> tuple[Tensor, Tensor]:
    """K and V for `capacity` entries of each head of each slot: two tensors [S, Hkv, C, D]."""
    shape = memory.shape
    size = (len(memory.appended), shape.n_kv_heads, capacity, shape.head_dim)
    # Zeros, not empty: attention multiplies an unused entry by a weight of zero, and NaN would survive that.
    k, v = (memory.host.zeros(size, shape.dtype, memory.lengths.device) for _ in range(2))
    return k, v


class DenseLayer:
    """K and V of one layer, [S, Hkv, C, D] each (see KVLayer)."""

    per_head: ClassVar[bool] = False
    kv_dtype: ClassVar[str | None] = None

    def __init__(self, memory: LayerMemory) -> None:
        self.capacity = memory.capacity
        self.lengths, self.starts = memory.lengths, memory.starts
        self._appended = memory.appended
        n_slots = len(memory.appended)
        self._stored = [0] * n_slots
        self._spans = [0] * n_slots
        self.k, self.v = self._memory(memory)

    @staticmethod
    def bytes_of(capacity: int, shape: EntryShape) -> int:
        return 2 * capacity * shape.n_kv_heads * shape.head_dim * shape.dtype.itemsize

    def span(self, slot: int) -> int:
        return max(self._spans[slot], self.count(slot))

    def count(self, slot: int) -> int:
        return self._stored[slot] + self._appended[slot]

    def entries(self, slot: int) -> int:
        return self.count(slot) * self.k.shape[1]

    def forgettable(self, slot: int) -> int:
        return self.count(slot)

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        assert kept is None or isinstance(kept, Tensor), "heads of different lengths belong into a PerHeadLayer"
        before = max(map(self.count, slots))
        if kept is not None:
            index = kept.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
            k, v = k.gather(2, index), v.gather(2, index)
        count = k.shape[2]
        self._fill(slots, 0, k, v)
        self._blank(slots, count, before)
        self._set_counts(slots, count)
        for slot in slots:
            self._spans[slot] = count + room

    def extend(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        before = self.count(slots[0])
        self._fill(slots, before, k, v)
        self._set_counts(slots, before + k.shape[2])

    def append(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        index = places.flatten(1).unsqueeze(2).expand(-1, -1, k.shape[3])  # [B, Hkv * T, D]
        for memory, new in ((self.k, k), (self.v, v)):
            memory[slots.start : slots.stop].flatten(1, 2).scatter_(1, index, new.flatten(1, 2))

    def write(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        if len(slots) > 1:
            self.append(slots, k, v, places)
            return
        slot, first = slots.start, self._stored[slots.start] + self._appended[slots.start]
        end = first + k.shape[2]
        self.k[slot : slot + 1, :, first:end], self.v[slot : slot + 1, :, first:end] = k, v

    def read(self, slots: range, new: int = 0) -> list[Part]:
        if len(slots) == 1:
            count = self._stored[slots.start] + self._appended[slots.start] + new
            slot = slice(slots.start, slots.stop)
            return [Part(self.k[slot, :, :count], self.v[slot, :, :count])]
        counts = [self.count(slot) + new for slot in slots]
        longest = max(counts)
        if longest * len(counts) > _WASTE * sum(counts):
            return [
                Part(*self.padded(range(one, one + 1), count), slice(index, index + 1))
                for index, (one, count) in enumerate(zip(slots, counts, strict=True))
            ]
        part = Part(*self.padded(slots, longest))
        if min(counts) == longest:
            return [part]
        live = self.lengths[slots.start : slots.stop, :, None, None] + new  # the device knows: the host need not wait
        return [Part(part.k, part.v, live=live)]

    def attend(self, slots: range, q: Tensor, window: int | None = None) -> Tensor:
        raise NotImplementedError("the engine attends to what `read` gives")

    def row(self, slot: int) -> tuple[Tensor, ...]:
        raise NotImplementedError("the engine attends to what `read` gives")

    def padded(self, slots: range, span: int) -> tuple[Tensor, Tensor]:
        return self.k[slots.start : slots.stop, :, :span], self.v[slots.start : slots.stop, :, :span]

    def flat(self) -> tuple[Tensor, Tensor] | None:
        return self.k.flatten(0, 2), self.v.flatten(0, 2)

    @property
    def rows(self) -> int:
        return self.k.shape[1] * self.k.shape[2]

    def truncate(self, slots: range, count: int) -> None:
        before = self.count(slots[0])
        self._blank(slots, before - count, before)
        self._set_counts(slots, before - count)

    def clear(self, slots: range) -> None:
        for slot in slots:
            self._blank(range(slot, slot + 1), 0, self.count(slot) + 1)  # and one that a step wrote and did not count
            self._stored[slot] = self._spans[slot] = 0
        self.lengths[slots.start : slots.stop].zero_()

    def state(self, slot: int) -> dict[str, Tensor]:
        count = self.count(slot)
        return {"k": self.k[slot, :, :count].clone(), "v": self.v[slot, :, :count].clone()}

    def restore(self, slot: int, state: dict[str, Tensor], room: int) -> None:
        self.store(range(slot, slot + 1), state["k"].unsqueeze(0), state["v"].unsqueeze(0), None, room)

    def _memory(self, memory: LayerMemory) -> tuple[Tensor, Tensor]:
        """K and V, [S, Hkv, C, D] each."""
        return new_memory(memory, memory.capacity)

    def _fill(self, slots: range, first: int, k: Tensor, v: Tensor) -> None:
        end = first + k.shape[2]
        self.k[slots.start : slots.stop, :, first:end] = k
        self.v[slots.start : slots.stop, :, first:end] = v

    def _blank(self, slots: range, first: int, end: int) -> None:
        if first < end:
            self.k[slots.start : slots.stop, :, first:end].zero_()
            self.v[slots.start : slots.stop, :, first:end].zero_()

    def _set_counts(self, slots: range, count: int) -> None:
        for slot in slots:
            self._stored[slot] = count - self._appended[slot]
        self.lengths[slots.start : slots.stop].fill_(count)
