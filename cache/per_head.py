"""A layout for heads of different lengths: the entries of a head follow those of the head before it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import Kept, LayerMemory, Part
from fastkv.cache.selection import PerHead


class PerHeadLayer(DenseLayer):
    """The memory of a DenseLayer, read as one row of Hkv * C entries for each slot (see KVLayer).

    Each head has room for the tokens to come after its own entries. Heads of the same length would take as much
    together: memory that one head does without is the other heads'.
    """

    per_head: ClassVar[bool] = True

    def __init__(self, memory: LayerMemory) -> None:
        super().__init__(memory)
        n_slots, n_heads = self.k.shape[:2]
        self._heads = [[0] * n_heads for _ in range(n_slots)]  # stored entries of each slot and head
        self._first = [[0] * n_heads for _ in range(n_slots)]  # where they begin

    def span(self, slot: int) -> int:
        # One head may have nearly all of them. How many it has changes with the request, and a span is captured.
        return self.capacity * self.k.shape[1]

    def count(self, slot: int) -> int:
        return max(self._heads[slot]) + self._appended[slot]

    def entries(self, slot: int) -> int:
        return sum(self._heads[slot]) + self._appended[slot] * self.k.shape[1]

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        chosen = PerHead.everything(k) if kept is None else kept
        if isinstance(chosen, Tensor):
            chosen = PerHead.evenly(chosen, k.shape[2])
        source = chosen.index.unsqueeze(2).expand(-1, -1, k.shape[-1])
        rows_k, rows_v = (new.flatten(1, 2).gather(1, source) for new in (k, v))
        n_entries, n_heads = chosen.index.shape[1], k.shape[1]
        begin = torch.tensor(self._begin(slots, n_entries + n_heads * room), device=k.device).unsqueeze(1)
        target = torch.arange(n_entries, device=k.device) + chosen.heads * room + begin
        target = target.unsqueeze(2).expand_as(source)
        memory_k, memory_v = self._rows(slots)
        memory_k.scatter_(1, target, rows_k)
        memory_v.scatter_(1, target, rows_v)
        starts = chosen.before + torch.arange(n_heads, device=k.device) * room + begin
        self.starts[slots.start : slots.stop] = starts
        self.lengths[slots.start : slots.stop] = chosen.counts
        for slot, counts, first in zip(slots, chosen.counts.tolist(), starts.tolist(), strict=True):
            self._heads[slot] = [count - self._appended[slot] for count in counts]
            self._first[slot] = first

    def extend(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        self.append(slots, k, v, places)
        self._add(slots, k.shape[2])

    def write(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        self.append(slots, k, v, places)  # each head has its own place, which `places` says

    def read(self, slots: range, new: int = 0) -> list[Part]:
        return [
            self._of_head(index, slot, head, new)
            for index, slot in enumerate(slots)
            for head in range(len(self._heads[slot]))
        ]

    def padded(self, slots: range, span: int) -> tuple[Tensor, Tensor]:
        memory_k, memory_v = self._rows(slots)
        places = self.starts[slots.start : slots.stop].unsqueeze(2) + torch.arange(span, device=memory_k.device)
        rows = places.clamp_max(memory_k.shape[1] - 1).flatten(1)  # beyond a head's own entries nothing is live
        index = rows.unsqueeze(2).expand(-1, -1, memory_k.shape[2])
        k, v = (memory.gather(1, index).unflatten(1, places.shape[1:]) for memory in (memory_k, memory_v))
        return k, v

    def truncate(self, slots: range, count: int) -> None:
        for part in self.read(slots):
            part.k[:, :, part.k.shape[2] - count :].zero_()
            part.v[:, :, part.v.shape[2] - count :].zero_()
        self._add(slots, -count)

    def clear(self, slots: range) -> None:
        for memory in self._rows(slots):
            memory.zero_()  # heads of the next sequence begin elsewhere
        for slot in slots:
            self._heads[slot] = [0] * len(self._heads[slot])
        self.lengths[slots.start : slots.stop] = 0

    def state(self, slot: int) -> dict[str, Tensor]:
        parts = self.read(range(slot, slot + 1))
        counts = torch.tensor([part.k.shape[2] for part in parts])
        k, v = (torch.cat(heads, dim=2)[0, 0] for heads in ([p.k for p in parts], [p.v for p in parts]))
        return {"k": k, "v": v, "counts": counts}

    def restore(self, slot: int, state: dict[str, Tensor], room: int) -> None:
        k, v, counts = state["k"], state["v"], state["counts"].to(state["k"].device)
        # As if one head had seen all entries, each head keeping its own run of them.
        n_heads, total = len(counts), len(k)
        heads = torch.repeat_interleave(torch.arange(n_heads, device=k.device), counts)
        index = heads * total + torch.arange(total, device=k.device)
        every_head_k, every_head_v = (rows.expand(1, n_heads, -1, -1) for rows in (k, v))
        kept = PerHead(counts.unsqueeze(0), index.unsqueeze(0), total)
        self.store(range(slot, slot + 1), every_head_k, every_head_v, kept, room)

    def _begin(self, slots: range, n_rows: int) -> list[int]:
        """Blank what the next `n_rows` rows of each slot are to be: where these begin."""
        self.clear(slots)
        return [0] * len(slots)

    def _rows(self, slots: range) -> tuple[Tensor, Tensor]:
        """K and V of these slots, [B, R, D] each."""
        return self.k[slots.start : slots.stop].flatten(1, 2), self.v[slots.start : slots.stop].flatten(1, 2)

    def _of_head(self, index: int, slot: int, head: int, new: int) -> Part:
        first = self._first[slot][head]
        live = slice(first, first + self._heads[slot][head] + self._appended[slot] + new)
        k, v = (memory[slot].flatten(0, 1)[live][None, None] for memory in (self.k, self.v))
        return Part(k, v, slice(index, index + 1), slice(head, head + 1))

    def _add(self, slots: range, count: int) -> None:
        for slot in slots:
            self._heads[slot] = [stored + count for stored in self._heads[slot]]
        self.lengths[slots.start : slots.stop] += count
