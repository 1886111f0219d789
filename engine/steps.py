"""The tokens of one running request, one after another. Knows no text and no stop rules.

Where the device works on its own, a step is launched before the token of the one before it is read: the host looks at
token n while the device makes token n + 1. A request that ends with token n lets the other go unread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from fastkv.engine.graph import GraphError
from fastkv.engine.memory import start_peak
from fastkv.engine.prefill import new_cache, prefill
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime


class Steps:
    """Prefill on construction, then `next_token`, at most `request.max_tokens` times; `close` when it is done."""

    def __init__(self, runtime: Runtime, request: Request) -> None:
        model = runtime.model
        start_peak(model.device)
        self._runtime, self._request = runtime, request
        self._buffers = runtime.pool.lease()
        prompt, policy = torch.tensor([request.prompt], device=model.device), request.policy
        self.cache = new_cache(model, policy, prompt, request.max_tokens, request.position_limit, self._buffers)
        self._decoder = runtime.decoder(self._buffers, request.params, prompt)
        result = prefill(model, prompt, policy, self.cache, self._buffers.workspace, runtime.attention)
        self._token = self._decoder.first(result.logits)
        self._launched = 1
        self._unread = deque([_read_later(self._token)])

    def next_token(self) -> int:
        """Wait for the next token."""
        if self._launched > 1 or not self._unread:  # the first token is handed over before anything else is begun
            self._launch_as_needed()
        return self._unread.popleft()()

    def close(self) -> None:
        """Hand the memory to the next request."""
        self._runtime.pool.give_back(self._buffers)

    def _launch_as_needed(self) -> None:
        wanted = 2 if self._runtime.ahead else 1
        while len(self._unread) < wanted and self._launched < self._request.max_tokens:
            self._token = self._step()
            self._unread.append(_read_later(self._token))
            self._launched += 1

    def _step(self) -> Tensor:
        try:
            return self._decoder.step(self.cache, self._token)
        except GraphError as error:
            self._decoder = self._runtime.eagerly(self._decoder, error)
            return self._decoder.step(self.cache, self._token)


def _read_later(token: Tensor) -> Callable[[], int]:
    """Begin to fetch a token id, int64 [1]; the result waits for it."""
    if token.device.type != "cuda":
        value = int(token)
        return lambda: value
    copy = torch.empty(1, dtype=torch.int64, pin_memory=True)
    copy.copy_(token, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(token.device))

    def read() -> int:
        copied.synchronize()
        return int(copy)

    return read
