"""Small pools of two KV heads, for the tests of what layers, pools and caches do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.pool import KVPool

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
