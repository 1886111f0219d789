"""KVCache: the handle of a sequence in a pool. It may outlive the request that filled it, continue and rewind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.layer import EntryShape, Kept, KVLayer, Part
from fastkv.cache.pool import KVPool, round_up
from fastkv.cache.quantised import REWIND
from fastkv.cache.reader import Reader
from fastkv.cache.selection import PerHead
from fastkv.cache.snapshot import Snapshot
from fastkv.errors import FastKVError, check_integer


class KVCache:
    """The entries of B sequences of one length: their slots in a pool, and how far they have come.

    position: the next token's, an int; the device has it too (KVPool.next_position). Positions from `position_limit`
    on are beyond what the model can tell apart. room: tokens that can still be appended.
    unfinished: whether a prefill is under way, or failed: then the layers do not belong together.
    whole_from: the position from which on every layer holds every token; what stands before it was chosen by a policy.
    reader: chooses what a step of one token reads (None: everything). It is made by a prefill, and is in no snapshot.

    Filled by a prefill: `begin`, for each layer `store` or `extend`, then `end`. Each decode step then appends to every
    layer and calls `advance`.
    """

    def __init__(self, pool: KVPool, slots: range, room: int, position_limit: int) -> None:
        self.pool, self.slots, self.batch = pool, slots, len(slots)
        self.room, self.position_limit = room, position_limit
        self._entry_room = room  # for entries of each head after those that a prefill stores
        self.position = self.whole_from = 0
        self._chosen: list[Tensor | None] = [None] * len(pool.layers)  # int64 [B, Hkv, n], before whole_from
        self.unfinished, self._whole = False, True
        self.reader: Reader | None = None
        self._row: tuple[tuple[int, int], Tensor] | None = None  # of which positions, and these

    @property
    def layers(self) -> Sequence[KVLayer]:
        """How each layer's entries are stored, for all slots of the pool."""
        return self.pool.layers

    @property
    def layout(self) -> type[KVLayer]:
        """How they are stored."""
        return self.pool.layout

    @property
    def nbytes(self) -> int:
        """Bytes of its slots for keys and values, and of what chooses among them."""
        index = 0 if self.reader is None else self.reader.nbytes
        return self.pool.nbytes // self.pool.n_slots * self.batch + index

    @property
    def next_position(self) -> Tensor:
        """int64 [B], on the device."""
        return self.pool.next_position[self.slots.start : self.slots.stop]

    @property
    def lengths(self) -> Tensor:
        """int64 [L, B, Hkv], on the device: live entries of each head."""
        return self.pool.lengths[:, self.slots.start : self.slots.stop]

    def count(self, layer: int) -> int:
        """Live entries of the longest head of a layer."""
        return self.layers[layer].count(self.slots[0])

    def mean(self, layer: int) -> int:
        """Live entries of a head of a layer on average, rounded up."""
        return -(-self.layers[layer].entries(self.slots[0]) // self.pool.shape.n_kv_heads)

    @property
    def is_even(self) -> bool:
        """Whether the heads of each layer have the same number of entries."""
        n_heads = self.pool.shape.n_kv_heads
        return all(layer.entries(self.slots[0]) == n_heads * layer.count(self.slots[0]) for layer in self.layers)

    @property
    def entries(self) -> int:
        """Live entries of each sequence, over all layers and heads."""
        return sum(self.layer_entries)

    @property
    def layer_entries(self) -> tuple[int, ...]:
        """Live entries of each layer, over all heads; of the first sequence, where they differ."""
        return tuple(layer.entries(self.slots[0]) for layer in self.layers)

    @property
    def forgettable(self) -> int:
        """How many of the newest tokens its layouts can forget."""
        return min(layer.forgettable(slot) for layer in self.layers for slot in self.slots)

    def positions(self, layer: int, end: int | None = None) -> Tensor:
        """The positions of the live entries of a layer: int64 [B, Hkv, n], ascending.

        Where heads keep different numbers, -1 stands after the chosen ones of a shorter head. end: as if the sequence
        continued whole up to this position (None: as it is).
        """
        whole = self._positions_of_whole(self.position if end is None else end)
        chosen = self._chosen[self.pool.source(layer)]
        return whole if chosen is None else torch.cat((chosen, whole), dim=2)

    def _positions_of_whole(self, end: int) -> Tensor:
        """Those from `whole_from` up to `end`: int64 [B, Hkv, n], made once for all layers that ask.

        One for each layer would not take much, but lie between the large tensors of the layers, and keep the allocator
        from using their memory again.
        """
        known = self._row
        if known is None or known[0] != (self.whole_from, end):
            row = torch.arange(self.whole_from, end, device=self.pool.device)
            known = self._row = ((self.whole_from, end), row)
        return known[1].expand(self.batch, self.pool.shape.n_kv_heads, -1)

    def read(self, layer: int) -> list[Part]:
        """The live entries of a layer: see KVLayer.read."""
        return self.layers[layer].read(self.slots)

    # --- a prefill ---

    def begin(self, whole: bool, room: int) -> None:
        """A prefill begins: until `end` the layers do not belong together.

        whole: each layer will keep every new token. room: tokens that can be appended after the prefill.
        """
        self.unfinished, self._whole, self.reader = True, whole, None
        self.room = self._entry_room = room

    def store(self, layer: int, k: Tensor, v: Tensor, kept: Kept, positions: Tensor, to_come: int = 0) -> None:
        """Replace a layer's entries by the `kept` of k and v [B, Hkv, T, D], which stand at `positions` [B, Hkv, n].

        to_come: entries that `extend` adds before the prefill ends.
        """
        self.pool.layers[layer].store(self.slots, k, v, kept, self._entry_room + to_come)
        if not self._whole:
            self._chosen[layer] = positions

    def store_each(self, layer: int, k: Tensor, v: Tensor, kept: Sequence[PerHead], positions: Tensor) -> None:
        """As `store`, where sequences keep different numbers of a layer's entries: `kept` has one for each."""
        for row, (slot, of_row) in enumerate(zip(self.slots, kept, strict=True)):
            part = slice(row, row + 1)
            self.pool.layers[layer].store(range(slot, slot + 1), k[part], v[part], of_row, self._entry_room)
        self._chosen[layer] = positions

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Add the entries k and v [B, Hkv, T, D] to a layer, all of which then stand at `positions` [B, Hkv, n + T]."""
        storage = self.pool.layers[layer]
        storage.extend(self.slots, k, v, self.pool.places_in(layer, self.slots, k.shape[2]))
        if not self._whole:
            self._chosen[layer] = positions

    def end(self, position: int, position_limit: int) -> None:
        """The prefill is done: the next token stands at `position`, and the sequence may have so many positions."""
        if not self._whole:
            self.whole_from = position
        self.position, self.position_limit = position, position_limit
        self.next_position.fill_(position)
        self.unfinished = False

    # --- decode steps ---

    def check_room(self, count: int = 1) -> None:
        """Raise FastKVError unless `count` more tokens fit into the buffers and into the model's context."""
        if count > self.room:
            raise FastKVError(
                f"the cache is full: it has room for {self.room} more tokens, not {count}; prefill with more max_tokens"
            )
        if count > REWIND and self.layout.kv_dtype is not None:
            raise FastKVError(
                f"a step over {self.layout.kv_dtype} entries takes {REWIND} tokens at most, not {count}; "
                "a prefill that continues the cache takes any number"
            )
        if self.position + count > self.position_limit:
            raise FastKVError(f"the sequence has reached the limit of {self.position_limit} tokens")

    def advance(self, count: int = 1, on_device: bool = True) -> None:
        """End a step of `count` tokens. on_device: False where a graph has counted there itself."""
        self.position += count
        self.room -= count
        self.pool.advance(self.slots, count, on_device)

    def truncate(self, count: int) -> None:
        """Forget the last `count` tokens, as if they had never been.

        Raises FastKVError for what is no such number, and where a policy has chosen among them: what it dropped for
        them cannot come back.
        """
        check_integer("count", count, 0)
        most = min(self.position - self.whole_from, self.forgettable)
        if count > most:
            raise FastKVError(
                f"the cache can forget its last {most} tokens, not {count}: "
                "what stands before them was compressed, or never there"
            )
        for layer in self.layers:
            layer.truncate(self.slots, count)
        if self.reader is not None:
            self.reader.forget([self.count(layer) for layer in range(len(self.layers))])
        self.position -= count
        self.room += count
        self.next_position.fill_(self.position)

    def has_room(self, capacities: Sequence[int], new: int) -> bool:
        """Whether each layer has room for `capacities` entries, and each head for `new` tokens after its own."""
        fits = all(wanted <= there for wanted, there in zip(capacities, self.pool.capacities, strict=True))
        return fits and (new <= self.room or not self.pool.layout.per_head)

    def make_room(self, capacities: Sequence[int], new: int) -> None:
        """Let each layer have room for `capacities` entries, and each head for `new` tokens after its own.

        The entries move to a new pool, which is this cache's alone; see `has_room` for whether that is needed.
        """
        old = self.pool
        counts = map(self.mean if old.layout.per_head else self.count, range(len(old.layers)))
        sizes = [max(wanted, round_up(count)) for wanted, count in zip(capacities, counts, strict=True)]
        pool = KVPool(old.layout, sizes, self.batch, old.shape, old.device, old.shared)
        slots = pool.take_all()
        for layer, before in zip(pool.layers, old.layers, strict=True):
            for slot, old_slot in zip(slots, self.slots, strict=True):
                layer.restore(slot, before.state(old_slot), new)
        self.pool, self.slots = pool, slots  # only now: where memory runs out meanwhile, nothing has changed
        self.next_position.fill_(self.position)

    # --- one sequence, kept apart from its slot ---

    def snapshot(self) -> Snapshot:
        """What the cache of one sequence holds now, in memory of its own on the same device."""
        slot = self.slots[0]
        return Snapshot(
            self.layout,
            self.pool.shape,
            tuple(layer.state(slot) for layer in self.layers),
            tuple(self._chosen),
            tuple(layer.count(slot) for layer in self.layers),
            tuple(layer.entries(slot) for layer in self.layers),
            self.position,
            self.whole_from,
            self.forgettable,
        )

    def restore(self, snapshot: Snapshot, room: int) -> None:
        """Hold what a snapshot holds, with room for that many tokens after it: of an empty cache of one sequence.

        Raises FastKVError for entries that this layout cannot take.
        """
        snapshot = snapshot.for_layout(self.layout)
        slot, device = self.slots[0], self.pool.device
        for layer, state in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(slot, {name: each.to(device) for name, each in state.items()}, room)
        self._chosen = [None if each is None else each.to(device) for each in snapshot.chosen]
        self.position, self.whole_from, self.room = snapshot.position, snapshot.whole_from, room
        self.next_position.fill_(self.position)


def shortened(snapshot: Snapshot, count: int) -> Snapshot:
    """A snapshot without its last `count` tokens. Raises FastKVError where a policy has chosen among them."""
    sizes = map(snapshot.mean if snapshot.layout.per_head else snapshot.count, range(len(snapshot.layers)))
    pool = KVPool(snapshot.layout, [round_up(size) for size in sizes], 1, snapshot.shape, snapshot.device)
    cache = KVCache(pool, pool.take_all(), 0, snapshot.position)
    cache.restore(snapshot, 0)
    cache.truncate(count)
    return cache.snapshot()


def check_cache(cache: Any, n_layers: int, shape: EntryShape, device: torch.device) -> None:
    """Raise FastKVError unless this is a usable cache of a model of that many layers and that shape of entries."""
    if not isinstance(cache, KVCache):
        raise FastKVError(f"a cache is what a prefill has left (pre.cache), not {type(cache).__name__}")
    pool = cache.pool
    if (len(pool.layers), pool.shape, pool.device) != (n_layers, shape, device):
        raise FastKVError("this cache is of another model, dtype or device than the one that is to use it")
    if cache.unfinished:  # its layers do not belong together
        raise FastKVError("the cache was left by a prefill that failed; start with a new one")
