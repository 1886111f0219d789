"""Who guesses the next tokens: the text itself (`TextDraft`), or the model over fewer entries (`SelfDraft`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.engine.plan import RequestPlan
from fastkv.engine.runtime import Runtime
from fastkv.engine.sampler import Sampler, SamplingParams
from fastkv.engine.speculation.lookup import Lookup

_TOGETHER = 32  # entries of a head that are appended at a time: any layout of a cache takes so many
Entries = list[tuple[Tensor, Tensor]]  # k and v [1, Hkv, T, D] of each layer


class Draft(Protocol):
    """Guesses the tokens of one answer. It is told all tokens of the text; the last one has been read by nobody."""

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none where it has no idea."""

    def add(self, tokens: Sequence[int], entries: Entries | None) -> None:
        """The text goes on with `tokens`. entries: K and V of the token before them and of all but the last of them.

        None after a plain step. Where tokens were proposed, they come from the verification of these.
        """

    def close(self) -> None:
        """Hand what it holds to the next answer."""


class TextDraft:
    """What followed the last tokens earlier in the text. ids: the text so far."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._lookup = Lookup(ids)

    def propose(self, count: int) -> list[int]:
        """See Draft."""
        return self._lookup.after(count)

    def add(self, tokens: Sequence[int], entries: Entries | None) -> None:
        """See Draft."""
        self._lookup.add(tokens)

    def close(self) -> None:
        """See Draft: it holds nothing."""


class SelfDraft:
    """The model, or the same with fewer bits, over the entries that a policy keeps.

    What it draws, it draws with the random numbers of `judge`, which will choose at the same places: where both see the
    same logits, they choose the same token.
    """

    def __init__(self, runtime: Runtime, plan: RequestPlan, whole: KVCache, judge: Sampler) -> None:
        """whole: the cache that decides, which holds every token."""
        self._runtime, self._whole, self._judge = runtime, whole, judge
        self._buffers = runtime.buffers.lease()
        self._state = self._buffers.state_for(plan.layout, plan.capacities, 1, runtime.model)
        slot = self._state.pool.take()
        self._slots = range(slot, slot + 1)
        self.cache: KVCache = plan.cache_in(self._state.pool, self._slots)
        self._stepper = runtime.stepper(self._buffers, plan.eager)
        self._unfed: list[int] = []  # tokens of the text that its cache lacks, the last one of the text included

    def start(self, params: SamplingParams, ids: Tensor) -> None:
        """Begin, where the prefill has filled `cache`. ids: int64 [1, N], the prompt."""
        self._state.sampler.start(self._slots.start, params, ids)

    @torch.inference_mode()
    def propose(self, count: int) -> list[int]:
        """See Draft."""
        if not count:
            return []
        state, slot, *missing, pending = self._state, self._slots.start, *self._unfed
        if missing:
            self._catch_up(len(missing))
        state.sampler.follow(slot, self._judge)
        state.tokens[slot].fill_(pending)
        drafted = []
        for _ in range(count):
            self._stepper.step({slot: self.cache})
            drafted.append(state.tokens[slot].clone())
        self._unfed = [pending]
        self.cache.truncate(count)
        tokens: list[int] = torch.stack(drafted).tolist()
        return tokens[: next((place for place, token in enumerate(tokens) if token < 0), count)]

    @torch.inference_mode()
    def add(self, tokens: Sequence[int], entries: Entries | None) -> None:
        """See Draft. The entries take the place of its own: they are the full cache's, and so the better ones."""
        if entries is None or len(self._unfed) != 1:
            self._unfed += tokens
            return
        self._write(entries, len(tokens))
        self._unfed = [tokens[-1]]

    def _catch_up(self, count: int) -> None:
        """Take over the entries of `count` tokens, which plain steps have made."""
        first, end = self.cache.position, self.cache.position + count
        for start in range(first, end, _TOGETHER):
            some = slice(start, min(start + _TOGETHER, end))
            # One layer after another: what a layout has in fewer bits is read as a copy.
            parts = (self._whole.read(layer)[0] for layer in range(len(self.cache.layers)))
            self._write(((part.k[:, :, some], part.v[:, :, some]) for part in parts), some.stop - some.start)

    def _write(self, entries: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
        """Append the first `count` of these entries of each layer."""
        places = self.cache.pool.places(self._slots, count)
        for layer, of_layer, (k, v) in zip(self.cache.layers, places, entries, strict=True):
            layer.write(self._slots, k[:, :, :count], v[:, :, :count], of_layer)
        self.cache.advance(count)

    def close(self) -> None:
        """See Draft."""
        self._state.sampler.stop(self._slots.start)
        self._state.pool.release(self._slots)
        self._runtime.buffers.give_back(self._buffers)
