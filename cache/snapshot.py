"""Snapshot: what the cache of one sequence held at one moment. Nobody writes to it, so that many may go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.errors import FastKVError


@dataclass(frozen=True)
class Snapshot:
    """The entries of one sequence, in memory of their own.

    layout, shape: of the layers that they come from. layers: of each what its KVLayer.state gave. chosen: of each the
    positions of its entries before `whole_from`, int64 [1, Hkv, n] as KVCache.positions has them, ascending; None where
    a policy never chose. longest: of each the live entries of its longest head; entries: those of all its heads.
    position: the next token's. whole_from: from here on every layer holds every token. newest: tokens that the layers
    can forget (None: as many as they hold).
    """

    layout: type[KVLayer]
    shape: EntryShape
    layers: tuple[Mapping[str, Tensor], ...]
    chosen: tuple[Tensor | None, ...]
    longest: tuple[int, ...]
    entries: tuple[int, ...]
    position: int
    whole_from: int
    newest: int | None = None

    @property
    def forgettable(self) -> int:
        """Tokens at the end that can be forgotten."""
        whole = self.position - self.whole_from
        return whole if self.newest is None else min(whole, self.newest)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        if self.layout.kv_dtype is not None:
            return sum(each.nbytes for state in self.layers for each in state.values())
        one = 2 * self.shape.head_dim * self.shape.dtype.itemsize
        return sum(self.entries) * one

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return next(iter(self.layers[0].values())).device

    def count(self, layer: int) -> int:
        """Entries of the longest head of a layer."""
        return self.longest[layer]

    def mean(self, layer: int) -> int:
        """Entries of a head of a layer on average, rounded up."""
        return -(-self.entries[layer] // self.shape.n_kv_heads)

    @property
    def is_even(self) -> bool:
        """Whether the heads of each layer have the same number of entries."""
        pairs = zip(self.longest, self.entries, strict=True)
        return all(entries == self.shape.n_kv_heads * longest for longest, entries in pairs)

    def for_layout(self, layout: type[KVLayer]) -> Snapshot:
        """The same entries, for layers of a layout: that of the snapshot, or one for heads of different lengths.

        Raises FastKVError for a layout that cannot take them.
        """
        alike = layout.kv_dtype == self.layout.kv_dtype
        if layout is self.layout or (alike and layout.per_head and self.layout.per_head):
            return self
        if alike and layout.per_head and self.layout is DenseLayer:
            return replace(self, layout=layout, layers=tuple(map(_by_head, self.layers)))
        if alike and layout.per_head and layout.kv_dtype is not None:  # whose states are the same in all layouts
            return replace(self, layout=layout)
        raise FastKVError(
            f"a cache in the layout {self.layout.__name__} cannot go on in one of {layout.__name__}: "
            "run these requests in lists of their own"
        )


def _by_head(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state of a DenseLayer as that of a PerHeadLayer: k and v [Hkv, n, D] as rows [Hkv * n, D]."""
    n_heads, count, _ = state["k"].shape
    counts = torch.full((n_heads,), count, dtype=torch.int64)
    return {"k": state["k"].flatten(0, 1), "v": state["v"].flatten(0, 1), "counts": counts}
