"""Sequences that decode together. Each has a slot of the pool, its own position and its own way to choose tokens.

Knows no text and no stop rules: the caller, who reads the tokens, says when a sequence is done.

Where the device works on its own, a step is launched before the tokens of the one before it are read: the host looks at
tokens n while the device makes tokens n + 1. What was launched for a sequence that then ends is never read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import KVLayer
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.pool import bucket
from fastkv.cache.quantised_layouts import QuantisedModelWideLayer
from fastkv.engine.graph import GraphError
from fastkv.engine.memory import start_peak
from fastkv.engine.offloading.run import kind_of
from fastkv.engine.plan import RequestPlan
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime
from fastkv.engine.sampler import NOT_FINITE, not_finite_error
from fastkv.engine.turn import Held
from fastkv.errors import FastKVError


@dataclass
class _Sequence:
    """A request at work.

    begins: the position after its prompt, 0 until that is read. launched: tokens that have been asked of the device,
    read or not.
    """

    request: Request
    cache: KVCache
    begins: int = 0
    launched: int = 1


class DecodeBatch:
    """Room for `n_slots` requests at a time, of those `to_come`; `close` when they are done.

    kv_memory: bytes that all slots may take (None: no limit).

    Prefill happens in `admit`, one request at a time: no padding goes through it.
    """

    def __init__(
        self, runtime: Runtime, to_come: Sequence[Request], n_slots: int = 1, kv_memory: int | None = None
    ) -> None:
        start_peak(runtime.model.device)
        self._runtime = runtime
        self._buffers = runtime.buffers.lease()
        layout, capacities = layout_of(to_come), capacities_of(to_come)
        shared = to_come[0].plan.shared
        self._state = self._buffers.state_for(layout, capacities, n_slots, runtime.model, kv_memory, shared)
        self._stepper = runtime.stepper(self._buffers, next(filter(None, (each.plan.eager for each in to_come)), ""))
        self._at_work: dict[int, _Sequence] = {}
        self._n_slots = n_slots
        self._unread: deque[tuple[dict[int, _Sequence], Callable[[], list[int]]]] = deque()

    @property
    def has_room(self) -> bool:
        """Whether another request can be admitted."""
        return len(self._at_work) < self._n_slots

    def admit(self, request: Request) -> tuple[int, Prefill]:
        """Prefill a request into a free slot, and launch its first token: the slot, and what the prefill left.

        Raises FastKVError for a turn that its session cannot run now.
        """
        model, state, turn = self._runtime.model, self._state, request.turn
        slot = state.pool.take()
        cache = request.plan.cache_in(state.pool, range(slot, slot + 1))
        self._at_work[slot] = sequence = _Sequence(request, cache)  # from here on `close` ends it, too
        if turn is not None:
            turn.owner.begin(turn)  # not earlier: its session would wait for good for a turn that nobody ends
        self._begin(request, cache)
        state.sampler.start(slot, request.params, request.all_ids.to(model.device))
        result = self._prefill(request, request.ids, request.plan, cache)
        sequence.begins = cache.position
        state.first(slot, result.logits)
        self._unread.append(({slot: self._at_work[slot]}, _read_later(state.tokens)))
        return slot, result

    def _begin(self, request: Request, cache: KVCache) -> None:
        """Let the cache hold what comes before the request's own tokens."""
        beginning, room = request.beginning, request.plan.n_tokens + request.max_tokens
        if beginning is not None and request.reads_beginning:
            result = self._prefill(request, beginning.ids, replace(beginning.plan, max_tokens=room), cache)
            beginning.keep(cache.snapshot(), result.layer_tokens)
        elif request.past is not None:
            cache.restore(request.past, room)
        if beginning is not None:
            beginning.taken()

    def _prefill(self, request: Request, ids: Tensor, plan: RequestPlan, cache: KVCache) -> Prefill:
        """Read ids, int64 [1, N] on the host, of a request."""
        model, attention = self._runtime.model, self._runtime.attention
        ids = ids.to(model.device)
        given = (model, ids, plan, cache, self._buffers.workspace, attention, request.eos_ids)
        return prefill(*given, None, kind_of(plan))

    def finish(self, slot: int, token_ids: Sequence[int], text: str) -> None:
        """A request is done, as far as these tokens of its answer: if it is a turn, its session has them."""
        sequence = self._at_work.get(slot)
        if sequence is None or not sequence.begins:
            return
        turn, cache = sequence.request.turn, sequence.cache
        if turn is None or not turn.keep:
            return
        fed = max(0, len(token_ids) - 1)  # nothing has read the last one; what was launched beyond it is forgotten
        steps = cache.pool.appended[slot]
        cache.position = sequence.begins + steps  # an interrupt within a step may have counted in one of the two only
        cache.truncate(steps - fed)
        before = sequence.request.all_ids[0].tolist()
        after = Held((*before, *token_ids), len(before) + fed, cache.snapshot())
        turn.owner.end(turn, after, text)

    def release(self, slot: int) -> None:
        """A request is over: its slot is free for another one, and what was launched for it is never read.

        A turn that was not finished has changed nothing.
        """
        turn = self._at_work.pop(slot).request.turn
        if turn is not None:
            turn.owner.end(turn, None, "")
        self._state.sampler.stop(slot)
        self._state.pool.release(range(slot, slot + 1))

    def launch_as_needed(self) -> None:
        """See to it that there is something to read, and something under way meanwhile."""
        wanted = 2 if self._runtime.ahead else 1
        while len(self._unread) < wanted and self._launch():
            pass

    def read(self) -> list[tuple[int, int]]:
        """Wait for the oldest tokens that are unread: (slot, token id) of each request that is still at work.

        Raises FaultError where the model's logits were NaN or infinite.
        """
        sequences, tokens = self._unread.popleft()
        values = tokens()
        found = [(slot, values[slot]) for slot, each in sequences.items() if self._at_work.get(slot) is each]
        if any(token == NOT_FINITE for _, token in found):
            raise not_finite_error(self._runtime.model.dtype)
        return found

    def close(self) -> None:
        """Hand the memory to the next requests; those still at work end."""
        for slot in list(self._at_work):
            self.release(slot)
        if self._state.pool.is_free:  # else an interrupt fell between two lines that belong together
            self._runtime.buffers.give_back(self._buffers)

    def _launch(self) -> bool:
        """One more token for each request that may have one; whether there is such a request."""
        going = {slot: each for slot, each in self._at_work.items() if each.launched < each.request.max_tokens}
        if not going:
            return False
        self._step({slot: going[slot].cache for slot in sorted(going)})
        for each in going.values():
            each.launched += 1
        self._unread.append((going, _read_later(self._state.tokens)))
        return True

    def _step(self, caches: dict[int, KVCache]) -> None:
        try:
            self._stepper.step(caches)
        except GraphError as error:
            self._stepper = self._runtime.eagerly(self._state, error)
            self._stepper.step(caches)


def layout_of(requests: Sequence[Request]) -> type[KVLayer]:
    """The layout that any of the requests can be stored in.

    One for heads of different lengths takes plain ones, too: a policy may store what it leaves whole in a simpler one,
    and sessions have policies of their own. Raises FastKVError where sessions have begun with another kv_dtype.
    """
    layouts = list(dict.fromkeys(request.plan.layout for request in requests))
    if len({layout.kv_dtype for layout in layouts}) > 1:
        raise FastKVError(
            "a session goes on with the kv_dtype that it began with, and these requests have several: put them into "
            "lists of their own",
            setting="kv_dtype",
        )
    by_head = [layout for layout in layouts if layout.per_head]
    wide = [layout for layout in by_head if issubclass(layout, (ModelWideLayer, QuantisedModelWideLayer))]
    return (wide or by_head or layouts)[0]


def capacities_of(requests: Sequence[Request]) -> list[int]:
    """The entries of each layer that suffice for any of the requests."""
    return [bucket(max(layer)) for layer in zip(*(request.plan.capacities for request in requests), strict=True)]


def _read_later(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to fetch token ids, int64 [S]; the result waits for them."""
    if tokens.device.type != "cuda":
        values = tokens.tolist()
        return lambda: values
    copy = torch.empty(tokens.shape, dtype=torch.int64, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tokens.device))

    def read() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return read
