"""Layers that read the entries of an earlier one: what can share, and what a prefill holds for them meanwhile.

In a prefill a reader attends, with its own queries, to the K and V of all tokens that its source computed and that have
come as far as the reader. What of them stays in the cache is chosen once, by the scores of the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer_map import Sources, read_map
from fastkv.cache.policy import LayerPlan
from fastkv.engine.attention import take_tokens
from fastkv.engine.projection import Projection
from fastkv.engine.workspace import Workspace
from fastkv.errors import FastKVError
from fastkv.models.files import fingerprint
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama


def turn_alike(model: Llama, reader: int, source: int) -> bool:
    """Whether the queries of one layer can meet the keys of the other: both are turned by the same rotary embedding."""
    return model.blocks[reader].self_attn.rotary == model.blocks[source].self_attn.rotary


def sources_of(given: Any, n_layers: int, folder: Path) -> Sources:
    """The source of each layer by a map's file, or by {reader: source}; () where no layer reads another.

    Raises FastKVError as read_map does, and for the map of another model than the one in `folder`.
    """
    if given is None:
        return ()
    found = read_map(given)
    sources = found.sources(n_layers)
    if isinstance(given, (str, PathLike)):
        found.check_model(fingerprint(folder))
    return sources if found.pairs else ()


def check_alike(model: Llama, sources: Sources) -> None:
    """FastKVError where a layer cannot make use of its source's keys."""
    for reader, source in enumerate(sources):
        if not turn_alike(model, reader, source):
            raise FastKVError(
                f"layer {reader} cannot read layer {source}: the two turn keys by different rotary embeddings; leave "
                "this pair out of the map",
                setting="share_layers",
            )


def pairs_of(sources: Sources) -> tuple[tuple[int, int], ...]:
    """(reader, source) of each layer that reads another, by rising reader."""
    return tuple((reader, source) for reader, source in enumerate(sources) if reader != source)


def last_readers(sources: Sources) -> dict[int, int]:
    """Of each layer that others read, the last one of these."""
    return {source: reader for reader, source in pairs_of(sources)}


def held_at_most(layers: Sequence[LayerPlan], sources: Sources) -> int:
    """Tokens whose K and V `SharedEntries` holds copies of, at most, counted in each layer that is held."""
    last, held = last_readers(sources), dict[int, int]()
    most = 0
    for layer, plan in enumerate(layers):
        if layer in last:
            held[layer] = plan.seen
        most = max(most, sum(held.values()))
        left = {source: count for source, count in held.items() if last[source] > layer}
        if plan.propagated is not None and left:  # one is copied while all are there
            most = max(most, sum(held.values()) + plan.propagated)
            left = dict.fromkeys(left, plan.propagated)
        held = left
    return most


class SharedEntries:
    """K and V of the layers that later ones read, from their own layer of a prefill to the last one that reads them.

    copies: whether they are copied; else the cache keeps everything, and is read.
    """

    def __init__(self, sources: Sources, cache: KVCache, copies: bool) -> None:
        self._sources, self._cache, self._copies = sources, cache, copies
        self._last = last_readers(sources)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def source(self, layer: int) -> int:
        """The layer that it reads; itself, where it has entries of its own."""
        return self._sources[layer]

    def hold(self, layer: int, k: Tensor, v: Tensor) -> None:
        """A layer has computed k and v [B, Hkv, T, D], in memory that the next one writes over."""
        if self._copies and layer in self._last:
            self._held[layer] = _copy(k), _copy(v)

    def propagate(self, chosen: Tensor) -> None:
        """Later layers see the tokens at `chosen`, int64 [B, n], alone."""
        for layer, (k, v) in self._held.items():
            self._held[layer] = take_tokens(k, chosen), take_tokens(v, chosen)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V [B, Hkv, T, D] that a layer reads, of the tokens that it sees."""
        source = self._sources[layer]
        if not self._copies:
            (part,) = self._cache.read(source)
            return part.k, part.v
        return self._held.pop(source) if self._last[source] == layer else self._held[source]


class SharedProjection(Projection):
    """As Projection; layers that read others compute queries alone, and are given what `shared` holds for them."""

    def __init__(self, model: Llama, workspace: Workspace, shared: SharedEntries) -> None:
        super().__init__(model, workspace)
        self._shared = shared

    def everything(self, layer: int, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        if self._shared.source(layer) != layer:
            return self.queries(layer, hidden, rope), *self._shared.of(layer)
        q, k, v = super().everything(layer, hidden, rope)
        self._shared.hold(layer, k, v)
        return q, k, v

    def keys(self, layer: int, hidden: Tensor, rope: Rope, n_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._shared.source(layer) != layer:
            return self.last_queries(layer, hidden, rope, n_queries), *self._shared.of(layer)
        q, k, v = super().keys(layer, hidden, rope, n_queries)
        self._shared.hold(layer, k, v)
        return q, k, v


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
