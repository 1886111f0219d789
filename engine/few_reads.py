"""A decode step whose sequences read few of their entries: gathered K and V, and exact attention over these alone.

What is read, the reader of each cache chooses, layer by layer, from the step's own queries (cache/reader.py). Such
steps are eager: what they read, and how much, changes from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import KVLayer, Part
from fastkv.cache.pool import KVPool
from fastkv.cache.reader import Reader
from fastkv.engine.attention import attend_parts, decode_attention
from fastkv.engine.decode_attention import EagerAttention, StepAttention, Windows


class FewReads:
    """Attention of one token for each sequence of these caches, in the order of their slots in one pool.

    Caches without a reader read everything.
    """

    def __init__(self, caches: Sequence[KVCache], windows: Windows) -> None:
        self._parts: list[tuple[slice, StepAttention]] = []
        first = 0
        for has_reader, alike in groupby(caches, lambda cache: cache.reader is not None):
            together = list(alike)
            groups = [[cache] for cache in together] if has_reader else [together]
            for group in groups:
                end = first + sum(cache.batch for cache in group)
                self._parts.append((slice(first, end), _attention_of(group, windows)))
                first = end

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = [attend(layer, q[rows], k[rows], v[rows]) for rows, attend in self._parts]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attention_of(caches: Sequence[KVCache], windows: Windows) -> StepAttention:
    """Of one cache with a reader, or of several without."""
    if caches[0].reader is not None:
        return _ChosenAttention(caches[0], caches[0].reader, windows)
    return EagerAttention(caches[0].pool, [cache.slots for cache in caches], 1, windows)


class _ChosenAttention:
    """Of the sequences of a cache that has a reader."""

    def __init__(self, cache: KVCache, reader: Reader, windows: Windows) -> None:
        self._pool, self._slots, self._reader, self._windows = cache.pool, cache.slots, reader, windows
        self._places = cache.pool.places(cache.slots, 1)
        self._n_tokens = cache.position + 1
        reader.steps += 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        storage, window = self._pool.layers[layer], self._windows[layer]
        storage.write(self._slots, k, v, self._places[layer])
        grouped = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, D]
        chosen = self._reader.choose(layer, grouped, storage, self._slots, self._n_tokens, window)
        if chosen is None:
            return attend_parts(storage.read(self._slots, 1), q, window)
        if chosen.dtype == torch.bool:
            return of_heads(storage.read(self._slots, 1), q, chosen)
        return decode_attention(q, *taken(self._pool, layer, self._slots, chosen, self._reader))


def taken(pool: KVPool, layer: int, slots: range, chosen: Tensor, reader: Reader) -> tuple[Tensor, Tensor]:
    """K and V of some entries of each head: chosen int64 [B, Hkv, m] -> [B, Hkv, m, D] each, valid until the next."""
    storage = pool.layers[layer]
    flat = storage.flat()
    assert flat is not None, "single entries are looked up where they lie"
    rows = (chosen + _first_rows(pool, storage, layer, slots)).flatten()
    outs = reader.rows(len(rows), flat[0])
    k, v = (torch.index_select(memory, 0, rows, out=out) for memory, out in zip(flat, outs, strict=True))
    return k.view(*chosen.shape, -1), v.view(*chosen.shape, -1)


def _first_rows(pool: KVPool, storage: KVLayer, layer: int, slots: range) -> Tensor:
    """Where the entries of each head begin in the flat memory of a layer: int64 [B, Hkv, 1]."""
    starts = pool.starts[layer, slots.start : slots.stop].unsqueeze(2)
    if slots.stop == 1:
        return starts
    return starts + torch.arange(slots.start, slots.stop, device=starts.device).view(-1, 1, 1) * storage.rows


def of_heads(parts: Sequence[Part], q: Tensor, reads: Tensor) -> Tensor:
    """Attention of those KV heads alone that read, bool [B, Hkv], over all entries; that of the others is 0.

    q: [B, Hq, 1, D] -> the same shape. Neighbours are computed together, from views.
    """
    attended, group = torch.zeros_like(q), q.shape[1] // reads.shape[1]
    wanted = reads.tolist()
    for part in parts:
        rows, heads = range(len(wanted))[part.sequences], range(reads.shape[1])[part.heads]
        for row in rows:
            in_part = slice(row - rows.start, row - rows.start + 1)
            for run in _runs([head for head in heads if wanted[row][head]]):
                inside = slice(run.start - heads.start, run.stop - heads.start)
                queries = slice(run.start * group, run.stop * group)
                k, v = part.k[in_part, inside], part.v[in_part, inside]
                attended[row : row + 1, queries] = decode_attention(q[row : row + 1, queries], k, v)
    return attended


def _runs(heads: Sequence[int]) -> list[range]:
    """Rising numbers as runs of neighbours."""
    runs: list[range] = []
    for head in heads:
        first = runs.pop().start if runs and runs[-1].stop == head else head
        runs.append(range(first, head + 1))
    return runs
