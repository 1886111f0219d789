"""A layout whose layers share the memory of a slot: what one layer does without is the others'."""

from __future__ import annotations

from torch import Tensor

from fastkv.cache.dense import new_memory
from fastkv.cache.layer import Kept, LayerMemory
from fastkv.cache.per_head import PerHeadLayer


class ModelWideLayer(PerHeadLayer):
    """The entries of a layer follow those of the layer before, in one row of entries for each slot (see KVLayer).

    A prefill stores its layers in their order. Together they may hold what all capacities add up to; a layer by itself
    may hold more than its own.
    """

    def __init__(self, memory: LayerMemory) -> None:
        super().__init__(memory)
        assert memory.before is None or isinstance(memory.before, ModelWideLayer), "layers of a pool have one layout"
        n_slots = len(memory.appended)
        self._before = memory.before
        self._ends = [0] * n_slots  # of the rows of each slot: the first one after this layer's
        self._begins = [0] * n_slots
        self._longest = [0] * n_slots

    def span(self, slot: int) -> int:
        # A head may have all that its layer saw: the same for all layers, so that few spans are captured.
        return self._longest[slot]

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        super().store(slots, k, v, kept, room)
        for slot in slots:
            self._longest[slot] = k.shape[2] + room

    def clear(self, slots: range) -> None:
        for slot in slots:
            for memory in self._rows(range(slot, slot + 1)):
                memory[:, self._begins[slot] : self._ends[slot]].zero_()
            self._begins[slot] = self._ends[slot] = self._longest[slot] = 0
            self._heads[slot] = [0] * len(self._heads[slot])
        self.lengths[slots.start : slots.stop] = 0
        # A step for other slots writes at this place, too: the next prefill's first entry goes there.
        self.starts[slots.start : slots.stop] = 0

    def _begin(self, slots: range, n_rows: int) -> list[int]:
        for slot in slots:
            begin = 0 if self._before is None else self._before._ends[slot]
            for memory in self._rows(range(slot, slot + 1)):
                memory[:, begin : begin + n_rows].zero_()
            self._begins[slot], self._ends[slot] = begin, begin + n_rows
        return [self._begins[slot] for slot in slots]

    def _memory(self, memory: LayerMemory) -> tuple[Tensor, Tensor]:
        if memory.before is None:
            return new_memory(memory, sum(memory.capacities))
        assert isinstance(memory.before, ModelWideLayer)
        return memory.before.k, memory.before.v
