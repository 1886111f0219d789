"""Requests that decode together. Each has a row of the KV storage, its own position and its own way to choose tokens.

Knows no text and no stop rules: whoever reads the tokens says when a request is done.

Where the device works on its own, a step is launched before the tokens of the one before it are read: the host looks at
tokens n while the device makes tokens n + 1. What was launched for a request that then ends is never read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import plan_layers
from fastkv.cache.storage import bucket
from fastkv.engine.graph import GraphError
from fastkv.engine.memory import start_peak
from fastkv.engine.prefill import Prefill, new_cache, prefill
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime


@dataclass
class _Row:
    """A request at work. launched: tokens that have been asked of the device, read or not."""

    request: Request
    cache: KVCache
    launched: int = 1


class Rows:
    """Room for `n_rows` requests at a time, of those `to_come`; `close` when they are done.

    Prefill happens in `admit`, one request at a time: no padding goes through it.
    """

    def __init__(self, runtime: Runtime, to_come: Sequence[Request], n_rows: int = 1) -> None:
        model = runtime.model
        start_peak(model.device)
        self._runtime = runtime
        self._buffers = runtime.pool.lease()
        heads = (model.config.n_kv_heads, model.config.head_dim)
        slots = [bucket(count) for count in slots_of_all(to_come, model.config.n_layers)]
        self._storage = self._buffers.storage_for(slots, n_rows, heads, model.dtype, model.device)
        self._decoder = runtime.decoder(self._buffers)
        self._rows: dict[int, _Row] = {}
        self._free = deque(range(n_rows))
        self._unread: deque[tuple[dict[int, _Row], Callable[[], list[int]]]] = deque()

    @property
    def has_room(self) -> bool:
        """Whether another request can be admitted."""
        return bool(self._free)

    def admit(self, request: Request) -> tuple[int, Prefill]:
        """Prefill a request into a free row, and launch its first token: the row, and what the prefill left behind."""
        model, policy = self._runtime.model, request.policy
        row = self._free.popleft()
        prompt = torch.tensor([request.prompt], device=model.device)
        storage = self._storage.rows(row, row + 1)
        cache = new_cache(model, policy, prompt, request.max_tokens, request.position_limit, storage)
        self._start(row, cache, request, prompt)
        self._rows[row] = _Row(request, cache)  # from here on `close` ends it, too
        result = prefill(model, prompt, policy, cache, self._buffers.workspace, self._runtime.attention)
        self._decoder.first(row, result.logits)
        self._unread.append(({row: self._rows[row]}, _read_later(self._decoder.tokens)))
        return row, result

    def release(self, row: int) -> None:
        """A request is done: its row is free for another one, and what was launched for it is never read."""
        del self._rows[row]
        self._decoder.stop(row)
        self._free.append(row)

    def launch_as_needed(self) -> None:
        """See to it that there is something to read, and something under way meanwhile."""
        wanted = 2 if self._runtime.ahead else 1
        while len(self._unread) < wanted and self._launch():
            pass

    def read(self) -> list[tuple[int, int]]:
        """Wait for the oldest tokens that are unread: (row, token id) of each request that is still at work."""
        rows, tokens = self._unread.popleft()
        values = tokens()
        return [(row, values[row]) for row, state in rows.items() if self._rows.get(row) is state]

    def close(self) -> None:
        """Hand the memory to the next requests; those still at work end."""
        for row in list(self._rows):
            self.release(row)
        self._runtime.pool.give_back(self._buffers)

    def _launch(self) -> bool:
        """One more token for each request that may have one; whether there is such a request."""
        going = {row: state for row, state in self._rows.items() if state.launched < state.request.max_tokens}
        if not going:
            return False
        self._step(sorted(going))
        for state in going.values():
            state.launched += 1
        self._unread.append((going, _read_later(self._decoder.tokens)))
        return True

    def _start(self, row: int, cache: KVCache, request: Request, prompt: Tensor) -> None:
        try:
            self._decoder.start(row, cache, request.params, prompt)
        except GraphError as error:
            self._decoder = self._runtime.eagerly(self._decoder, error)
            self._decoder.start(row, cache, request.params, prompt)

    def _step(self, rows: list[int]) -> None:
        try:
            self._decoder.step(rows)
        except GraphError as error:
            self._decoder = self._runtime.eagerly(self._decoder, error)
            self._decoder.step(rows)


def slots_of_all(requests: Sequence[Request], n_layers: int) -> list[int]:
    """The slots of each layer that suffice for any of the requests."""
    each = []
    for request in requests:
        kept = [plan.kept for plan in plan_layers(request.policy, n_layers, len(request.prompt))]
        each.append(KVCache.capacities(kept, request.max_tokens))
    return [max(layer) for layer in zip(*each, strict=True)]


def _read_later(tokens: Tensor) -> Callable[[], list[int]]:
    """Begin to fetch token ids, int64 [R]; the result waits for them."""
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
