"""Reader: what a request whose steps read few of its entries knows of their keys, and which it reads in a step.

The cache keeps all entries; a step chooses some by an index (`Index`) of each layer's keys, and attends to these alone,
exactly. A policy says what the index is (Policy.index). The reader belongs to a cache (KVCache.reader): a prefill makes
it when all layers are stored, and `choose` brings it up to date with what steps have appended since. Knows no model;
engine/few_reads.py makes the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastkv.cache.layer import KVLayer
from fastkv.cache.pool import bucket


@dataclass(frozen=True)
class IndexSizes:
    """Of which keys an index is made.

    batch, n_kv_heads, head_dim, dtype: of a layer's keys. n_entries: that each head has; capacity: that it may ever
    have. budget: entries that a step reads of a head now.
    """

    batch: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    n_entries: int
    capacity: int
    budget: int

    @property
    def key_bytes(self) -> int:
        """Of one key in each head of each sequence."""
        return self.batch * self.n_kv_heads * self.head_dim * self.dtype.itemsize


class Index(Protocol):
    """What is known of one layer's keys. Its memory is there from the beginning."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""

    def due(self, n_entries: int) -> bool:
        """Whether it is to `learn` before it can choose among so many entries."""

    def learn(self, k: Tensor) -> None:
        """k: [B, Hkv, n, D], all keys of the layer. What was known of them before stays as it is."""

    def forget(self, n_entries: int) -> None:
        """Only the first so many entries are left."""

    def choose(self, q: Tensor, n_entries: int, budget: int) -> Tensor | None:
        """What a step reads of the entries, the newest of which is the step's own: q [B, Hkv, G, D], `due` or not.

        int64 [B, Hkv, m], entries of each head, each once; or bool [B, Hkv], heads that read everything, where the
        others read nothing. None: all heads read everything.
        """

    @property
    def read_bytes(self) -> int:
        """Bytes of itself that it reads to choose, in a step."""


class Reader:
    """The indices of the layers of one cache; None for a layer that reads everything.

    steps: that have been made. read_bytes: of each layer what these have read: K, V and index.
    """

    def __init__(self, indices: Sequence[Index | None], budget: Callable[[int], int], entry_bytes: int) -> None:
        """budget: of a sequence of so many tokens, the entries that a step reads of a head. entry_bytes: of one."""
        self._indices, self._budget, self._entry_bytes = indices, budget, entry_bytes
        self.steps, self.read_bytes = 0, [0] * len(indices)
        self._rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the indices."""
        return sum(index.nbytes for index in self._indices if index is not None)

    def prepare(self, layer: int, storage: KVLayer, slots: range) -> None:
        """Learn of what a layer has stored, as far as there is an index."""
        index, n_entries = self._indices[layer], storage.count(slots.start)
        if index is not None and index.due(n_entries):
            index.learn(keys_of(storage, slots, 0))

    def choose(
        self, layer: int, q: Tensor, storage: KVLayer, slots: range, n_tokens: int, window: int | None = None
    ) -> Tensor | None:
        """See Index.choose, for a step that has written its entry and not counted it: q [B, Hkv, G, D].

        n_tokens: of the sequences, with the step's. window: of a layer with a sliding window, which is read whole once
        entries have left it.
        """
        index, n_entries = self._indices[layer], storage.count(slots.start) + 1
        chosen = None
        if window is not None and n_entries > window:
            index, n_entries = None, window
        if index is not None:
            if index.due(n_entries):
                index.learn(keys_of(storage, slots, 1))
            chosen = index.choose(q, n_entries, self._budget(n_tokens))
        self._book(layer, index, chosen, n_entries, q.shape[0] * q.shape[1])
        return chosen

    def forget(self, counts: Sequence[int]) -> None:
        """Only so many entries of each layer are left."""
        for index, count in zip(self._indices, counts, strict=True):
            if index is not None:
                index.forget(count)

    def rows(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for what is read of K and of V: `count` rows each, like [n, D]. All layers and steps use the same.

        New memory in each layer would cost more than the reading, on a CPU: the system clears it, page by page.
        """
        if self._rows is None or self._rows.shape[1] < count:
            self._rows = like.new_empty(2, bucket(count), like.shape[1])
        return self._rows[0, :count], self._rows[1, :count]

    def _book(self, layer: int, index: Index | None, chosen: Tensor | None, n_entries: int, n_heads: int) -> None:
        """Count what a step reads; n_heads: of all sequences."""
        read, looked_up = n_heads * n_entries, 0
        if chosen is not None and index is not None:
            read = int(chosen.sum()) * n_entries if chosen.dtype == torch.bool else chosen.numel()
            looked_up = index.read_bytes
        self.read_bytes[layer] += read * self._entry_bytes + looked_up


def wanted(products: Tensor, head_dim: int) -> Tensor:
    """How much the queries of a group want of each of n things, together: [B, Hkv, G, n] -> float64 [B, Hkv, n].

    products: with what stands for their keys. Each query spreads one share over all, as its attention would; so one
    whose products are large has no more to say than the others. float64, in which small shares are not all 0 and so
    equal. One query, or a sum of them: the products, which order as they do, as they are.
    """
    if products.shape[2] == 1:
        return products.squeeze(2)
    return products.double().mul_(head_dim**-0.5).softmax(dim=3).sum(dim=2)


def keys_of(storage: KVLayer, slots: range, new: int) -> Tensor:
    """All keys of a layer whose heads are equally long, [B, Hkv, n, D]: a view where they lie so. new: see read."""
    parts = storage.read(slots, new)
    if len(parts) == 1:
        return parts[0].k
    n_heads = max(part.heads.stop or part.k.shape[1] for part in parts)
    joined = parts[0].k.new_empty(len(slots), n_heads, *parts[0].k.shape[2:])
    for part in parts:
        joined[part.sequences, part.heads] = part.k
    return joined
