"""BoundedCache: a KVCache whose heads never hold many more entries than a budget, however long the answer grows.

Attention that entries receive while decoding is summed; when the room is used up, the best stay (DecodeBudget.best) and
move to the front, in the order of their positions. Positions stay what they are: keys are rotated already, and the
next token's position goes on. Knows no model; who makes the steps calls `make_way` before each, and `observe` in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import Kept
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.pool import KVPool
from fastkv.cache.scores import window_attention
from fastkv.cache.selection import PerHead


class _Stay(NamedTuple):
    """What stays of a layer: k and v [1, Hkv, m, D], of which `kept` are live (None: all)."""

    k: Tensor
    v: Tensor
    kept: Kept


class BoundedCache(KVCache):
    """The entries of one sequence, within a budget. first: steps from the prefill to the first eviction.

    That is said beforehand: each layer is to have room for them as soon as it is stored, and no layout changes them.
    sums: float32 [Hkv, n] of each layer, what each entry has received of the attention of all queries since the
    prefill, over the query heads of its KV head; empty until the first step.
    """

    def __init__(
        self, pool: KVPool, slots: range, room: int, position_limit: int, budget: DecodeBudget, first: int
    ) -> None:
        assert len(slots) == 1, "sequences drop their entries at different times"
        super().__init__(pool, slots, room, position_limit)
        self.budget = budget
        self.sums: list[Tensor] = []
        self._first = self._steps_left = first

    def begin(self, whole: bool, room: int) -> None:
        super().begin(whole, room)
        self._entry_room = min(room, self._first)
        self.sums, self._steps_left = [], self._first

    def make_way(self) -> None:
        """Before a step: where there is no room for one more entry, let each head keep its best."""
        if not self.sums:
            counts = map(self.count, range(len(self.layers)))
            size = self.pool.shape.n_kv_heads
            self.sums = [torch.zeros(size, self.budget.most(count), device=self.pool.device) for count in counts]
        if self._steps_left == 0:
            self._evict()

    def observe(self, layer: int, q: Tensor) -> None:
        """Add what the query of this step, q [1, Hq, 1, D], attends to; its own entry is in the layer already."""
        group = q.shape[1] // self.pool.shape.n_kv_heads
        for part in self.pool.layers[layer].read(self.slots, 1):
            heads = part.heads
            queries = q if heads.start is None else q[:, heads.start * group : heads.stop * group]
            received = window_attention(queries, part.k, 1).sum(dim=(2, 3))  # [1, h, n]
            self.sums[layer][heads, : received.shape[2]] += received[0]

    def advance(self, count: int = 1, on_device: bool = True) -> None:
        super().advance(count, on_device)
        self._steps_left -= count

    def truncate(self, count: int) -> None:
        super().truncate(count)
        self._steps_left += count
        for sums, lengths in zip(self.sums, self.lengths[:, 0], strict=False):
            sums *= torch.arange(sums.shape[1], device=sums.device) < lengths.unsqueeze(1)

    def _evict(self) -> None:
        self.unfinished = True  # until it is through the layers do not belong together
        n_layers = len(self.layers)
        longest = max(min(self.count(layer), self.budget.entries) for layer in range(n_layers))
        self._steps_left = self.budget.steps(longest)
        room = min(self._steps_left, self.room)
        if issubclass(self.pool.layout, ModelWideLayer):  # a layer may grow into the memory of the next one
            for storage, stay in zip(self.pool.layers, list(map(self._staying, range(n_layers))), strict=True):
                storage.store(self.slots, *stay, room)
        else:
            for layer, storage in enumerate(self.pool.layers):
                storage.store(self.slots, *self._staying(layer), room)
        self.whole_from = self.position
        self.unfinished = False

    def _staying(self, layer: int) -> _Stay:
        """The best entries of a layer, copied; their sums and positions take the place of those of all."""
        count = self.count(layer)
        positions = _packed(self.positions(layer)[0])  # [Hkv, n]
        best = self.budget.best(self.sums[layer][:, :count], positions, self.position)
        positions, sums = positions.gather(1, best), self.sums[layer].gather(1, best)
        self._chosen[layer] = positions.unsqueeze(0)
        self.sums[layer] = F.pad(sums, (0, self.budget.most(0) - sums.shape[1]))
        k, v = self.pool.layers[layer].padded(self.slots, count)
        index = best[None, :, :, None].expand(1, -1, -1, k.shape[3])
        kept = _live(positions) if self.pool.layout.per_head else None
        return _Stay(k.gather(2, index), v.gather(2, index), kept)


def _packed(positions: Tensor) -> Tensor:
    """Positions [Hkv, n] as the entries of each head lie: the -1 of a shorter head, which stand within, at its end."""
    return positions.gather(1, (positions < 0).to(torch.uint8).argsort(dim=1, stable=True))


def _live(positions: Tensor) -> PerHead:
    """Which of the entries at `positions`, int64 [Hkv, m], there are: -1 stands where a head has no more."""
    live = positions >= 0
    return PerHead(live.sum(dim=1).unsqueeze(0), live.flatten().nonzero().T, positions.shape[1])
