"""What the last prompts of a process have left, for later ones that begin alike. Off unless LLM has bytes for it."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache, shortened
from fastkv.cache.pool import bytes_of
from fastkv.cache.snapshot import Snapshot
from fastkv.engine.beginning import Beginning
from fastkv.engine.decode_batch import capacities_of, layout_of
from fastkv.engine.footprint import footprint
from fastkv.engine.memory import available_bytes
from fastkv.engine.plan import keeping_all, plan_request
from fastkv.engine.prefix import LEAST, common
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime


class PrefixStore:
    """Whole snapshots of prompts, in at most `limit` bytes of keys and values; those used longest ago go first.

    Several threads may use one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[tuple[Tensor, Snapshot]] = []  # of each its ids, int64 [N] on the host; the last used one last
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are in use."""
        with self._lock:
            return self._bytes()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept = []

    def find(self, ids: Tensor) -> tuple[int, Snapshot] | None:
        """How many of its first tokens a prompt, int64 [N], shares with one that is kept, and what that has left.

        The longest such beginning, which leaves one token at least of both; None for one that is not worth it.
        """
        with self._lock:
            lengths = [common(kept, ids) for kept, _ in self._kept]
            longest = max(lengths, default=0)
            if longest < LEAST:
                return None
            found = self._kept.pop(lengths.index(longest))
            self._kept.append(found)
            return longest, found[1]

    def keep(self, ids: Tensor, cache: KVCache) -> None:
        """Keep what a prompt, int64 [N], has left in the cache of one sequence: if it is whole, and there is memory.

        What is kept of a prompt that it begins with goes: this one serves in its place.
        """
        nbytes = 2 * cache.entries * cache.pool.shape.head_dim * cache.pool.shape.dtype.itemsize
        if cache.whole_from:
            return
        with self._lock:
            if nbytes > self._limit or any(_begins(kept, ids) for kept, _ in self._kept):
                return
            self._kept = [one for one in self._kept if not _begins(ids, one[0])]
            while self._bytes() + nbytes > self._limit:
                self._kept.pop(0)
            available = available_bytes(cache.pool.device)
            if available is None or nbytes <= available:
                self._kept.append((ids, cache.snapshot()))

    def _bytes(self) -> int:
        return sum(snapshot.nbytes for _, snapshot in self._kept)


def continued(runtime: Runtime, request: Request, store: PrefixStore) -> Request:
    """The request, as one that goes on after a beginning that is kept, if there is one, and memory for a copy of it."""
    found = store.find(request.ids[0])
    if found is None:
        return request
    (length, snapshot), model, whole = found, runtime.model, request.plan
    begun = plan_request(model.config, whole.policy, length, 0, model.dtype, whole.position_limit)
    if begun.compresses or begun.layout is not snapshot.layout:
        return request
    n_layers = len(whole.layers)
    beginning = Beginning(request.ids[:, :length], begun, waiting=1, layer_tokens=(length,) * n_layers)
    ids, limit = request.ids[:, length:], whole.position_limit
    rest = keeping_all(whole.policy)
    plan = plan_request(model.config, rest, ids.shape[1], request.max_tokens, model.dtype, limit, beginning)
    shorter = replace(request, ids=ids, plan=plan, beginning=beginning)
    slot = bytes_of(layout_of([shorter]), capacities_of([shorter]), plan.shape)
    needed = footprint(model, plan, slot + 2 * begun.nbytes, draws=request.params.temperature > 0)
    available = available_bytes(model.device)
    if available is not None and needed.total > available + runtime.buffers.reusable(slot, needed.workspace):
        return request
    beginning.snapshot = shortened(snapshot, snapshot.position - length)
    return shorter


def _begins(longer: Tensor, shorter: Tensor) -> bool:
    """Whether a prompt begins with all of another one."""
    count = shorter.shape[0]
    return count <= longer.shape[0] and torch.equal(longer[:count], shorter)
