"""Decode steps for the slots of a pool: what eager steps and replayed CUDA graphs share, and the eager steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastkv.cache.bounded import BoundedCache
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.pool import KVPool
from fastkv.engine.decode import run_layers
from fastkv.engine.decode_attention import EagerAttention, ObservedAttention, StepAttention
from fastkv.engine.few_reads import FewReads
from fastkv.engine.sampler import Sampler
from fastkv.kernels.threads import as_many
from fastkv.models.llama import Llama

Caches = Mapping[int, KVCache]  # of the sequences at work, by slot


@dataclass(frozen=True)
class SlotState:
    """What the sequences of a pool need besides their entries, on the device, at addresses that stay.

    tokens: int64 [S], the last token of each slot.
    """

    pool: KVPool
    sampler: Sampler
    tokens: Tensor

    @classmethod
    def of(cls, pool: KVPool, vocab_size: int) -> SlotState:
        tokens = torch.zeros(pool.n_slots, dtype=torch.int64, device=pool.device)
        return cls(pool, Sampler(pool.n_slots, vocab_size, pool.device), tokens)

    @torch.inference_mode()
    def first(self, slot: int, logits: Tensor) -> None:
        """Choose the first token of a slot, from the logits of its prefill, float32 [1, V]."""
        slots = torch.full((1,), slot, dtype=torch.int64, device=logits.device)
        self.tokens[slot : slot + 1] = self.sampler.sample_slots(logits, slots)


class Stepper(Protocol):
    """Makes decode steps for the sequences of a SlotState."""

    def step(self, caches: Caches) -> None:
        """Append the last token of these slots to their caches, and choose the next one of each."""


class EagerStepper:
    """One kernel after another, as the code reads."""

    def __init__(self, model: Llama, state: SlotState, threads: int | None = None) -> None:
        self._model, self._state, self._threads = model, state, threads

    @torch.inference_mode()
    def step(self, caches: Caches) -> None:
        """See Stepper. Raises FastKVError when a cache or the context is full."""
        with as_many(self._threads):
            self._step(caches)

    def _step(self, caches: Caches) -> None:
        state, runs = self._state, runs_of(sorted(caches))
        for cache in caches.values():
            cache.check_room()
        in_order = [caches[slot] for slot in sorted(caches)]
        bounded = {row: cache for row, cache in enumerate(in_order) if isinstance(cache, BoundedCache)}
        for each in bounded.values():
            each.make_way()
        slots = torch.tensor([slot for run in runs for slot in run], device=state.tokens.device)
        ids = state.tokens[slots].clamp_min(0).unsqueeze(1)  # what was not finite is no token: see Sampler
        positions = state.pool.next_position[slots].unsqueeze(1)
        attention: StepAttention = EagerAttention(state.pool, runs, 1, self._model.config.windows)
        if any(cache.reader is not None for cache in in_order):
            attention = FewReads(in_order, self._model.config.windows)
        elif bounded:
            attention = ObservedAttention(attention, bounded)
        logits = run_layers(self._model, ids, positions, attention)
        for cache in caches.values():
            cache.advance()
        state.tokens[slots] = state.sampler.sample_slots(logits[:, 0], slots)


def runs_of(slots: Sequence[int]) -> list[range]:
    """Slots in rising order, as runs of neighbours."""
    runs: list[range] = []
    for slot in slots:
        if runs and runs[-1].stop == slot:
            runs[-1] = range(runs[-1].start, slot + 1)
        else:
            runs.append(range(slot, slot + 1))
    return runs
