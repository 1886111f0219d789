"""Layouts whose entries are codes of 8 or 4 bits (kernels/packing.py): of a head all but the first and the newest.

A head holds its first SINKS entries and its newest in the model's dtype, exact. When there are more of the newest than
a block and REWIND together, the oldest block of them is packed: once, and for good. So REWIND tokens at least can be
forgotten again, and whether entries came one by one or all at once makes no difference.

How heads of different lengths share memory stands in quantised_layouts.py. What stands here knows no policy: a prefill
chooses among entries that are not packed yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkv.cache.layer import EntryShape, Kept, LayerMemory, Part
from fastkv.kernels.packed_attention import packed_attention
from fastkv.kernels.packed_loops import in_words
from fastkv.kernels.packing import SCHEMES, Packed, Scheme, pack, unpack

SINKS = 4  # first entries of a head: their keys are unlike all others (arXiv 2309.17453), and would spoil a block
REWIND = 32  # newest entries that are never packed


@dataclass
class Run:
    """Heads of a slot that hold equally many entries.

    first: their first block in the slot's memory; room: blocks that each of them has. stored: entries, without those
    that decode steps have appended. packed: blocks. k, v: exact entries, [h, E, D]; views: of the blocks, [h, n, …],
    until there are more of them; words: the same, with codes as words of 32 bits. To make these anew for each layer of
    each step takes a share of its time.
    """

    heads: slice
    first: int
    room: int
    k: Tensor
    v: Tensor
    stored: int = 0
    packed: int = 0
    views: Packed | None = None
    words: Packed | None = None

    @property
    def n_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)


class QuantisedLayer:
    """All heads of a sequence are equally long (see KVLayer). Memory: `Packed` [S, R, …], R blocks of all heads of a
    slot, and exact entries [S, Hkv, E, D].
    """

    per_head: ClassVar[bool] = False
    kv_dtype: ClassVar[str | None]

    def __init__(self, memory: LayerMemory) -> None:
        shape, n_slots = memory.shape, len(memory.appended)
        self.capacity, self.lengths, self.starts = memory.capacity, memory.lengths, memory.starts
        self._appended, self._scheme, self._shape = memory.appended, self._its_scheme(), shape
        device, exact = memory.lengths.device, self._exact_of(memory.capacity, shape)
        self._most = most_exact(self._scheme)
        size = (n_slots, shape.n_kv_heads, exact, shape.head_dim)
        self.k, self.v = (memory.host.zeros(size, shape.dtype, device) for _ in range(2))
        self._packed = self._memory(memory)
        self._runs: list[list[Run]] = [self._runs_of(slot, [0] * shape.n_kv_heads, 0) for slot in range(n_slots)]
        self._room = [0] * n_slots

    @classmethod
    def bytes_of(cls, capacity: int, shape: EntryShape) -> int:
        exact = 2 * shape.n_kv_heads * cls._exact_of(capacity, shape) * shape.head_dim * shape.dtype.itemsize
        return exact + cls._blocks_of(capacity, shape) * cls._its_scheme().block_bytes(shape.head_dim)

    def span(self, slot: int) -> int:
        return max(run.stored for run in self._runs[slot]) + max(self._room[slot], self._appended[slot])

    def count(self, slot: int) -> int:
        return max(run.stored for run in self._runs[slot]) + self._appended[slot]

    def entries(self, slot: int) -> int:
        return sum(run.n_heads * (run.stored + self._appended[slot]) for run in self._runs[slot])

    def forgettable(self, slot: int) -> int:
        return min(self._n_exact(slot, run) - (SINKS if run.packed else 0) for run in self._runs[slot])

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        for index, slot in enumerate(slots):
            heads = list(_kept_of(index, k, v, kept))
            counts = [keys.shape[1] for keys, _ in heads for _ in range(keys.shape[0])]
            self._begin(slot, counts, room)
            for run in self._runs[slot]:
                keys, values = heads[0] if len(heads) == 1 else heads[run.heads.start]
                here = run.heads if len(heads) == 1 else slice(None)
                self._push(slot, run, keys[here], values[here])
                run.stored += keys.shape[1]
            self.lengths[slot].copy_(torch.tensor(counts))

    def extend(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        self.write(slots, k, v, places)
        for slot in slots:
            for run in self._runs[slot]:
                run.stored += k.shape[2]
        self.lengths[slots.start : slots.stop] += k.shape[2]

    def append(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        raise NotImplementedError("a captured graph cannot decide what is packed")

    def write(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        for index, slot in enumerate(slots):
            for run in self._runs[slot]:
                self._push(slot, run, k[index, run.heads], v[index, run.heads])

    def read(self, slots: range, new: int = 0) -> list[Part]:
        return [
            Part(*self._unpacked(slot, run, new), slice(index, index + 1), run.heads)
            for index, slot in enumerate(slots)
            for run in self._runs[slot]
        ]

    def attend(self, slots: range, q: Tensor, window: int | None = None) -> Tensor:
        rows = q.reshape(len(slots), self._shape.n_kv_heads, -1, q.shape[3])  # [B, Hkv, G * T, D]
        n_new = q.shape[2]
        attended = [
            self._attend(slot, run, rows[index, run.heads], n_new, window)
            for index, slot in enumerate(slots)
            for run in self._runs[slot]
        ]
        return (attended[0] if len(attended) == 1 else torch.cat(attended)).view(q.shape)

    def row(self, slot: int) -> tuple[Tensor, ...]:
        """What the next token of a sequence attends to, with a place for its own k and v, the last one, to be written.

        Its heads are equally long. -> exact entries k and v [1, Hkv, m, D] alone, or blocks with codes as words
        (kernels/packed_loops.py), four tensors [Hkv, n, …], and these. What becomes too many is packed here.
        """
        (run,) = self._runs[slot]
        before = self._n_exact(slot, run)
        if blocks_over(before + 1, self._scheme):
            self._push(slot, run, run.k[:, :0], run.v[:, :0], room=1)
            before = self._n_exact(slot, run)
        exact = tuple(each[:, : before + 1].unsqueeze(0) for each in (run.k, run.v))
        if not run.packed:
            return exact
        blocks = self._blocks(slot, run)
        if run.words is None:
            run.words = in_words(blocks)
        return (*run.words, *exact)

    def padded(self, slots: range, span: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("only where graphs are captured")

    def flat(self) -> None:
        return None

    @property
    def rows(self) -> int:
        raise NotImplementedError("its memory is not flat")

    def truncate(self, slots: range, count: int) -> None:
        for slot in slots:
            assert count <= self.forgettable(slot), "packed entries cannot be forgotten"
            for run in self._runs[slot]:
                run.stored -= count
        self.lengths[slots.start : slots.stop] -= count

    def clear(self, slots: range) -> None:
        for slot in slots:
            self._runs[slot] = self._runs_of(slot, [0] * self._shape.n_kv_heads, 0)
            self._room[slot] = 0
        self.lengths[slots.start : slots.stop] = 0

    def state(self, slot: int) -> dict[str, Tensor]:
        """Blocks and exact entries of the heads one after the other, and how many each of them has."""
        runs = self._runs[slot]
        blocks = [self._blocks(slot, run) for run in runs]
        state = {name: torch.cat([getattr(each, name).flatten(0, 1) for each in blocks]) for name in Packed._fields}
        n_exact = [self._n_exact(slot, run) for run in runs]
        state["exact_k"] = torch.cat([run.k[:, :n].flatten(0, 1) for run, n in zip(runs, n_exact, strict=True)])
        state["exact_v"] = torch.cat([run.v[:, :n].flatten(0, 1) for run, n in zip(runs, n_exact, strict=True)])
        counts = [run.stored + self._appended[slot] for run in runs for _ in range(run.n_heads)]
        n_packed = [run.packed for run in runs for _ in range(run.n_heads)]
        return {**state, "counts": torch.tensor(counts), "blocks": torch.tensor(n_packed)}

    def restore(self, slot: int, state: dict[str, Tensor], room: int) -> None:
        counts, n_packed = state["counts"].tolist(), state["blocks"].tolist()
        self._begin(slot, counts, room)
        packed, block, first = Packed(*(state[name] for name in Packed._fields)), 0, 0
        for run in self._runs[slot]:
            run.stored, run.packed = counts[run.heads.start], n_packed[run.heads.start]
            run.stored -= self._appended[slot]
            here, n_exact = slice(block, block + run.n_heads * run.packed), self._n_exact(slot, run)
            for target, source in zip(self._blocks(slot, run), packed.part(here), strict=True):
                target.copy_(source.view(target.shape))
            for exact, name in ((run.k, "exact_k"), (run.v, "exact_v")):
                rows = state[name][first : first + run.n_heads * n_exact]
                exact[:, :n_exact] = rows.view(run.n_heads, n_exact, rows.shape[1])
            block, first = here.stop, first + run.n_heads * n_exact
        self.lengths[slot].copy_(torch.tensor(counts))

    # --- sizes ---

    @classmethod
    def _its_scheme(cls) -> Scheme:
        assert cls.kv_dtype is not None
        return SCHEMES[cls.kv_dtype]

    @classmethod
    def _exact_of(cls, capacity: int, shape: EntryShape) -> int:
        """Exact entries that a head has room for, and one that stays empty: a compiler tells full memory apart."""
        return min(capacity, most_exact(cls._its_scheme())) + 1

    @classmethod
    def _blocks_of(cls, capacity: int, shape: EntryShape) -> int:
        """Blocks of a slot: what none of its heads holds exact."""
        return shape.n_kv_heads * blocks_over(capacity, cls._its_scheme())

    def _memory(self, memory: LayerMemory) -> Packed:
        return self._new_memory(memory, self._blocks_of(memory.capacity, memory.shape))

    def _new_memory(self, memory: LayerMemory, n_blocks: int) -> Packed:
        lead, device = (len(memory.appended), n_blocks), memory.lengths.device
        shapes = self._scheme.shapes(memory.shape.head_dim)
        return Packed(*(memory.host.zeros((*lead, *shape), dtype, device) for shape, dtype in shapes))

    def _runs_of(self, slot: int, counts: Sequence[int], room: int) -> list[Run]:
        """Runs of heads that are to hold `counts` entries and `room` more; they hold none yet."""
        return [self._run(slot, slice(0, len(counts)), 0, self._packed.k.shape[1] // len(counts))]

    def _run(self, slot: int, heads: slice, first: int, room: int) -> Run:
        return Run(heads, first, room, self.k[slot, heads], self.v[slot, heads])

    # --- entries ---

    def _begin(self, slot: int, counts: Sequence[int], room: int) -> None:
        """Hold nothing, with room for so many entries of each head and `room` more."""
        self._runs[slot], self._room[slot] = self._runs_of(slot, counts, room), room
        for run in self._runs[slot]:
            run.stored = -self._appended[slot]

    def _push(self, slot: int, run: Run, k: Tensor, v: Tensor, room: int = 0) -> None:
        """Write k and v [h, T, D] after what a run holds, and count none of them; pack what becomes too many.

        room: for so many more that are written later.
        """
        before = self._n_exact(slot, run)
        end = before + k.shape[1]
        more = blocks_over(end + room, self._scheme)
        if not more:
            run.k[:, before:end], run.v[:, before:end] = k, v
            return
        if before:
            k, v = torch.cat((run.k[:, :before], k), dim=1), torch.cat((run.v[:, :before], v), dim=1)
        old = slice(SINKS, SINKS + more * self._scheme.block)
        run.packed += more
        pack(self._scheme, k[:, old], v[:, old], self._blocks(slot, run).part((slice(None), slice(-more, None))))
        rest = k.shape[1] - old.stop
        for exact, new in ((run.k, k), (run.v, v)):
            exact[:, :SINKS], exact[:, SINKS : SINKS + rest] = new[:, :SINKS], new[:, old.stop :]

    def _n_exact(self, slot: int, run: Run) -> int:
        """Exact entries of each head, the first ones included."""
        return run.stored + self._appended[slot] - run.packed * self._scheme.block

    def _attend(self, slot: int, run: Run, rows: Tensor, n_new: int, window: int | None) -> Tensor:
        """rows [h, G * T, D] -> the same shape."""
        exact = slice(self._n_exact(slot, run) + n_new)
        k, v = run.k[:, exact], run.v[:, exact]
        hidden = self._hidden(run, k.shape[1], rows.shape[1], n_new, window)
        return packed_attention(self._scheme, rows, self._blocks(slot, run), k, v, hidden)

    def _blocks(self, slot: int, run: Run) -> Packed:
        """The blocks that a run has, [h, n, …]: views."""
        if run.views is None or run.views.k.shape[1] != run.packed:
            run.views, run.words = self._views(slot, run), None
        return run.views

    def _views(self, slot: int, run: Run) -> Packed:
        here = slice(run.first, run.first + run.n_heads * run.room)
        # The heads' first blocks, their second ones, and so on: so strides do not depend on the room there is.
        blocks = (each[slot, here].unflatten(0, (run.room, run.n_heads)) for each in self._packed)
        return Packed(*(each[: run.packed].transpose(0, 1) for each in blocks))

    def _unpacked(self, slot: int, run: Run, new: int) -> tuple[Tensor, Tensor]:
        """All entries of a run, and `new` that are not counted, in their order: k and v [1, h, n, D]."""
        n_exact, n_packed = self._n_exact(slot, run) + new, run.packed * self._scheme.block
        size = (run.n_heads, n_exact + n_packed, self._shape.head_dim)
        k, v = (self.k.new_empty(size) for _ in range(2))
        first = min(SINKS, n_exact)
        middle = slice(first, first + n_packed)
        for out, exact in ((k, run.k), (v, run.v)):
            out[:, :first], out[:, middle.stop :] = exact[:, :first], exact[:, first:n_exact]
        if run.packed:
            unpack(self._scheme, self._blocks(slot, run), k[:, middle], v[:, middle])
        return k.unsqueeze(0), v.unsqueeze(0)

    def _hidden(self, run: Run, n_exact: int, n_rows: int, n_new: int, window: int | None) -> Tensor | None:
        """What each of the rows, G queries for each of `n_new` tokens, does not see: see packed_attention."""
        n_packed = run.packed * self._scheme.block
        count = n_packed + n_exact
        if n_new == 1 and (window is None or window >= count):
            return None
        device, first = self.k.device, min(SINKS, n_exact)
        order = [torch.arange(first, first + n_packed), torch.arange(first), torch.arange(first + n_packed, count)]
        places = torch.cat(order).to(device)
        last = torch.arange(count - n_new, count, device=device).repeat(n_rows // n_new).unsqueeze(1)
        hidden = places > last
        return hidden if window is None else hidden | (places <= last - window)


def most_exact(scheme: Scheme) -> int:
    return SINKS + scheme.block + REWIND


def blocks_over(count: int, scheme: Scheme) -> int:
    """Blocks that are packed of so many entries."""
    return max(0, -(-(count - most_exact(scheme)) // scheme.block))


def _kept_of(index: int, k: Tensor, v: Tensor, kept: Kept) -> Iterator[tuple[Tensor, Tensor]]:
    """What stays of a sequence, k and v [h, n, D] of heads that keep equally many: of all heads, or head by head."""
    if kept is None:
        yield k[index], v[index]
    elif isinstance(kept, Tensor):
        places = kept[index].unsqueeze(2).expand(-1, -1, k.shape[3])
        yield k[index].gather(1, places), v[index].gather(1, places)
    else:
        first, rows_k, rows_v = 0, k[index].flatten(0, 1), v[index].flatten(0, 1)
        for count in kept.counts[index].tolist():
            chosen = kept.index[index, first : first + count]
            yield rows_k[chosen].unsqueeze(0), rows_v[chosen].unsqueeze(0)
            first += count
