"""Small pools of two KV heads, for the tests of what layers, pools and caches do; and sequences that overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, SamplingParams
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


def _overflowing(store: Callable[..., None]) -> Callable[..., None]:
    def stored(self: DenseLayer, slots: range, k: Tensor, v: Tensor, *rest: Any) -> None:
        store(self, slots, torch.full_like(k, torch.inf), torch.full_like(v, torch.inf), *rest)

    return stored
