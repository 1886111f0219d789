"""A layer without entries: it reads those of another layer, which store one K and V for both (cache/layer_map.py)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastkv.cache.layer import EntryShape, Kept, KVLayer, Part


class ReadingLayer:
    """What `source` holds, to be read; nothing is written here, and nothing counts as its own (see KVLayer).

    New entries are written to the source, which comes before this layer in every step.
    """

    per_head: ClassVar[bool] = False
    kv_dtype: ClassVar[str | None] = None
    capacity = 0

    def __init__(self, source: KVLayer) -> None:
        self._source = source

    @staticmethod
    def bytes_of(capacity: int, shape: EntryShape) -> int:
        return 0

    def span(self, slot: int) -> int:
        return self._source.span(slot)

    def count(self, slot: int) -> int:
        return 0

    def entries(self, slot: int) -> int:
        return 0

    def forgettable(self, slot: int) -> int:
        return self._source.forgettable(slot)

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        raise NotImplementedError("this layer reads another one's entries, and stores none")

    def extend(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        raise NotImplementedError("this layer reads another one's entries, and stores none")

    def append(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        """The source has its own of these tokens."""

    def write(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        """As `append`."""

    def read(self, slots: range, new: int = 0) -> list[Part]:
        return self._source.read(slots, new)

    def attend(self, slots: range, q: Tensor, window: int | None = None) -> Tensor:
        return self._source.attend(slots, q, window)

    def row(self, slot: int) -> tuple[Tensor, ...]:
        raise NotImplementedError("layers that share entries are no compiled row")

    def padded(self, slots: range, span: int) -> tuple[Tensor, Tensor]:
        return self._source.padded(slots, span)

    def flat(self) -> tuple[Tensor, Tensor] | None:
        return self._source.flat()

    @property
    def rows(self) -> int:
        return self._source.rows

    def truncate(self, slots: range, count: int) -> None:
        """The source forgets."""

    def clear(self, slots: range) -> None:
        """The source does, too."""

    def state(self, slot: int) -> dict[str, Tensor]:
        return {}

    def restore(self, slot: int, state: dict[str, Tensor], room: int) -> None:
        assert not state, "this layer reads another one's entries"
