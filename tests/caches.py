"""A small cache, for the tests of what a cache does."""

from __future__ import annotations

from typing import TypeVar

import torch

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.storage import KVStorage

Kind = TypeVar("Kind", bound=KVCache)


def make_cache(
    kept: list[int], max_tokens: int = 4, batch: int = 1, storage: KVStorage | None = None, *, kind: type[Kind]
) -> Kind:
    """Two KV heads of dimension 3, behind a prompt of 100 tokens."""
    return kind(
        kept,
        max_tokens,
        batch=batch,
        n_kv_heads=2,
        head_dim=3,
        position=100,
        position_limit=1000,
        dtype=torch.float32,
        device=torch.device("cpu"),
        storage=storage,
    )
