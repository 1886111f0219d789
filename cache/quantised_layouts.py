"""The layouts of packed entries (quantised.py): which one stands for which plain layout, and those of unlike heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar, cast

from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import EntryShape, KVLayer, LayerMemory
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.quantised import QuantisedLayer, Run, blocks_over, most_exact
from fastkv.errors import FastKVError
from fastkv.kernels.packing import Packed


class QuantisedPerHeadLayer(QuantisedLayer):
    """Heads of different lengths: the blocks of a head, and room for those to come, follow those of the head before.

    Room that one head does without is the others'; each has its own exact entries.
    """

    per_head: ClassVar[bool] = True

    @classmethod
    def _exact_of(cls, capacity: int, shape: EntryShape) -> int:
        return min(capacity * shape.n_kv_heads, most_exact(cls._its_scheme()))

    @classmethod
    def _blocks_of(cls, capacity: int, shape: EntryShape) -> int:
        # At most as many as if one head had all entries: the exact ones of any head need none.
        return blocks_over(capacity * shape.n_kv_heads, cls._its_scheme())

    def _runs_of(self, slot: int, counts: Sequence[int], room: int) -> list[Run]:
        runs, first = [], self._first_block(slot)
        for head, count in enumerate(counts):
            blocks = blocks_over(count + room, self._scheme)
            runs.append(self._run(slot, slice(head, head + 1), first, blocks))
            first += blocks
        assert first <= self._packed.k.shape[1], "more entries than a pool has room for"
        return runs

    def _first_block(self, slot: int) -> int:
        """Where the blocks of this layer begin."""
        return 0


class QuantisedModelWideLayer(QuantisedPerHeadLayer):
    """The blocks of a layer follow those of the layer before (see ModelWideLayer)."""

    def __init__(self, memory: LayerMemory) -> None:
        assert memory.before is None or isinstance(memory.before, QuantisedModelWideLayer)
        self._before = memory.before
        super().__init__(memory)

    @classmethod
    def _exact_of(cls, capacity: int, shape: EntryShape) -> int:
        return most_exact(cls._its_scheme())  # a layer may hold more than its own capacity

    @classmethod
    def _blocks_of(cls, capacity: int, shape: EntryShape) -> int:
        return -(-capacity * shape.n_kv_heads // cls._its_scheme().block)

    def _memory(self, memory: LayerMemory) -> Packed:
        if self._before is not None:
            return self._before._packed
        return self._new_memory(memory, sum(self._blocks_of(each, memory.shape) for each in memory.capacities))

    def _first_block(self, slot: int) -> int:
        if self._before is None:
            return 0
        last = self._before._runs[slot][-1]
        return last.first + last.room


_PACKED: dict[type[KVLayer], type[QuantisedLayer]] = {
    DenseLayer: QuantisedLayer,
    PerHeadLayer: QuantisedPerHeadLayer,
    ModelWideLayer: QuantisedModelWideLayer,
}


@cache
def quantised(layout: type[KVLayer], kv_dtype: str) -> type[KVLayer]:
    """The layout that has a plain one's entries in so few bits, "int8" or "int4": the same class each time.

    Raises FastKVError where there is none.
    """
    if layout not in _PACKED:
        raise FastKVError(
            f"entries in the layout {layout.__name__} stay in the model's dtype: leave kv_dtype out", setting="kv_dtype"
        )
    name = f"{kv_dtype.capitalize()}{layout.__name__}"
    return cast(type[KVLayer], type(name, (_PACKED[layout],), {"kv_dtype": kv_dtype}))
