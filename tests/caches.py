"""Small pools of two KV heads, for the tests of layers, pools and caches; sequences that overflow; and a slow twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FullKV, SamplingParams
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.errors import FaultError

SHAPE = EntryShape(n_kv_heads=2, head_dim=3, dtype=torch.float32)
CPU = torch.device("cpu")


def make_pool(
    layout: type[KVLayer], capacities: Sequence[int] = (32, 32), n_slots: int = 1, shape: EntryShape = SHAPE
) -> KVPool:
    return KVPool(layout, capacities, n_slots, shape, CPU)


def make_cache(layout: type[KVLayer], capacities: Sequence[int] = (32, 32), batch: int = 1, room: int = 4) -> KVCache:
    """An empty cache that has a pool of its own."""
    pool = make_pool(layout, capacities, batch)
    return KVCache(pool, pool.take_all(), room, position_limit=1000)


def entries(count: int, batch: int = 1, seed: int = 0, head_dim: int = 3) -> tuple[Tensor, Tensor]:
    """Random k and v [B, 2, count, D]."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, 2, count, head_dim, generator=generator)
    return k, v


def memory_of(pool: KVPool, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of one layer: [S, Hkv * C, D], as the pool's `starts` count."""
    flat = pool.layers[layer].flat()
    assert flat is not None
    k, v = (rows.unflatten(0, (pool.n_slots, -1)) for rows in flat)
    return k, v


def live_entries(pool: KVPool, layer: int, slot: int, head: int) -> tuple[Tensor, Tensor]:
    """K and V [n, D] of one head, found by what the device knows alone."""
    first, count = int(pool.starts[layer, slot, head]), int(pool.lengths[layer, slot, head])
    k, v = (rows[slot, first : first + count].clone() for rows in memory_of(pool, layer))
    return k, v


def dead_entries(pool: KVPool, layer: int, slot: int) -> Tensor:
    """All of a slot that is not live: [n, D], keys and values."""
    k, v = memory_of(pool, layer)
    dead = torch.ones(k.shape[1], dtype=torch.bool)
    for head in range(pool.shape.n_kv_heads):
        first, count = int(pool.starts[layer, slot, head]), int(pool.lengths[layer, slot, head])
        dead[first : first + count] = False
    return torch.cat((k[slot, dead], v[slot, dead]))


def idle_pool(llm: LLM) -> KVPool:
    """The slots that no request is using now."""
    idle = llm._runtime.buffers._idle
    assert idle is not None
    assert idle.state is not None
    return idle.state.pool


def let_overflow(llm: LLM, prompts: list[list[int]], policy: Policy) -> KVPool:
    """Generate with keys and values that are all infinite, as in a model that float16 is too small for.

    Returns the idle slots, where that must have left nothing.
    """
    with pytest.MonkeyPatch.context() as patch:
        for layout in (DenseLayer, PerHeadLayer):
            patch.setattr(layout, "store", _overflowing(layout.store))
        with pytest.raises(FaultError):
            llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), policy)
    pool = idle_pool(llm)
    assert all(rows.isfinite().all() for layer in pool.layers for rows in layer.flat() or ())
    return pool


class FullByHead(FullKV):
    """The full cache in the other layout."""

    layout = PerHeadLayer


class SlowTwin:
    """Goes on from what a cache of one sequence holds, and attends from scratch to lists of entries, head by head.

    A sliding window counts these entries: it means what it should where none was dropped, or all are within it.
    """

    def __init__(self, llm: LLM, cache: KVCache, position: int) -> None:
        self.model, self.position = llm.model, position
        config = llm.config
        self.group = config.n_heads // config.n_kv_heads
        self.entries: list[list[tuple[Tensor, Tensor]]] = []
        for layer in range(config.n_layers):
            heads: list[tuple[Tensor, Tensor]] = []
            for part in cache.read(layer):
                heads += [(part.k[0, head].clone(), part.v[0, head].clone()) for head in range(part.k.shape[1])]
            self.entries.append(heads)

    @torch.inference_mode()
    def run(self, ids: Tensor) -> Tensor:
        """ids [1, T] -> logits [1, T, V], token by token."""
        self.model.reserve(self.position + ids.shape[1])
        logits = []
        for index in range(ids.shape[1]):
            hidden = self.model.embed(ids[:, index : index + 1])
            rope = self.model.rope(torch.tensor([[self.position]]))
            for layer, block in enumerate(self.model.blocks):
                q, k, v = block.project(hidden, rope)
                attended = []
                for head, (keys, values) in enumerate(self.entries[layer]):
                    keys, values = torch.cat((keys, k[0, head])), torch.cat((values, v[0, head]))
                    self.entries[layer][head] = (keys, values)
                    queries = q[0, head * self.group : (head + 1) * self.group, 0]
                    window = self.model.config.windows[layer] or len(keys)
                    keys, values = keys[-window:], values[-window:]
                    attended.append((queries @ keys.T / q.shape[-1] ** 0.5).softmax(-1) @ values)
                block.finish_(hidden, torch.cat(attended)[None, :, None])
            logits.append(self.model.head(hidden[:, -1]))
            self.position += 1
        return torch.stack(logits, dim=1)


def _overflowing(store: Callable[..., None]) -> Callable[..., None]:
    def stored(self: DenseLayer, slots: range, k: Tensor, v: Tensor, *rest: Any) -> None:
        store(self, slots, torch.full_like(k, torch.inf), torch.full_like(v, torch.inf), *rest)

    return stored
