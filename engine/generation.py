"""One request as an iterator: prefill, then a token at a time until something stops it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import plan_layers
from fastkv.engine.memory import explain_out_of_memory, peak_bytes
from fastkv.engine.output import Metrics, Output, Piece
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime
from fastkv.engine.steps import Steps
from fastkv.engine.stopping import StopStrings
from fastkv.models.detokenizer import Detokenizer
from fastkv.models.tokenizer import Tokenizer


class Generation(Iterator[Piece]):
    """Runs a request as it is iterated. `output()` tells what came of it, at the end or wherever it was left.

    `close()` ends it early and lets its memory go; so does its last token, or forgetting it.
    """

    def __init__(
        self, runtime: Runtime, tokenizer: Tokenizer | None, request: Request, called_at: float | None = None
    ) -> None:
        # time.perf_counter() when the user asked, if that was before now
        self._called_at = time.perf_counter() if called_at is None else called_at
        self._runtime = runtime
        self._model = model = runtime.model
        self._request = request
        self._detokenizer = Detokenizer(tokenizer.decode if tokenizer else lambda ids: "", request.prompt)
        self._stops = StopStrings(request.params.stop)
        self._plans = plan_layers(request.policy, model.config.n_layers, len(request.prompt))
        self._steps: Steps | None = None
        self._ended = False
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._times: list[float] = []
        self._finish_reason = "interrupted"
        self._kv_bytes = 0
        self._peak: int | None = None

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        with explain_out_of_memory():
            if self._steps is None:
                self._steps = Steps(self._runtime, self._request)
                self._kv_bytes = self._steps.cache.nbytes
            piece, finished = self._take(self._steps.next_token())
        if finished:
            self._peak = peak_bytes(self._model.device)
            self.close()
        return piece

    def close(self) -> None:
        """Generate no more, and let the next request have the memory. `output()` stays."""
        self._ended = True
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _take(self, token_id: int) -> tuple[Piece, bool]:
        """Book a new token; the piece to emit, and whether it is the last one."""
        self._times.append(time.perf_counter())
        self._token_ids.append(token_id)
        text = "" if token_id in self._request.eos_ids else self._detokenizer.push(token_id)
        text, stopped = self._stops.push(text)
        if stopped or token_id in self._request.eos_ids:
            self._finish_reason = "stop"
        elif len(self._token_ids) == self._request.max_tokens:
            self._finish_reason = "length"
        finished = self._finish_reason != "interrupted"
        if finished and not stopped:
            text += self._end_of_text()
        self._text.append(text)
        return Piece(text, token_id), finished

    def _end_of_text(self) -> str:
        """What was held back; it may still turn out to complete a stop string."""
        text, stopped = self._stops.push(self._detokenizer.flush())
        if stopped:
            self._finish_reason = "stop"
            return text
        return text + self._stops.flush()

    def output(self) -> Output:
        """Text, tokens and figures so far."""
        return Output("".join(self._text), list(self._token_ids), self._finish_reason, self._metrics())

    def _metrics(self) -> Metrics:
        request, config, times = self._request, self._model.config, self._times
        n_prompt, n_new = len(request.prompt), len(self._token_ids)
        kept = [plan.kept for plan in self._plans]
        full = KVCache.size_of([n_prompt] * config.n_layers, request.max_tokens, config.n_kv_heads, config.head_dim)
        return Metrics(
            prompt_tokens=n_prompt,
            new_tokens=n_new,
            ttft_s=times[0] - self._called_at if times else 0.0,
            decode_tokens_per_s=(n_new - 1) / (times[-1] - times[0]) if n_new > 1 else None,
            kv_tokens=round(sum(kept) / len(kept)),
            kv_entries=sum(kept) * config.n_kv_heads,
            kv_full_entries=n_prompt * len(kept) * config.n_kv_heads,
            kv_bytes=self._kv_bytes,
            kv_full_bytes=full * self._model.dtype.itemsize,
            tsp_tokens=self._plans[-1].seen,
            peak_bytes=self._peak,
        )
