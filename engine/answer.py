"""What becomes of one request, token by token: its text, its end, its figures. Knows no tensor and no other request."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from fastkv.cache.kv_cache import KVCache
from fastkv.engine.output import Metrics, Output, Piece, RunInfo
from fastkv.engine.request import Request
from fastkv.engine.stopping import StopStrings
from fastkv.models.config import ModelConfig
from fastkv.models.detokenizer import Detokenizer
from fastkv.models.tokenizer import Tokenizer


class Answer:
    """Books the tokens of a request as they come, until `take` says that one was the last.

    called_at: time.perf_counter() when the user asked. peak: set by the code that runs the request.
    """

    peak: int | None = None

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        tokenizer: Tokenizer | None,
        request: Request,
        called_at: float,
    ) -> None:
        self.request = request
        self._config, self._dtype, self._device, self._called_at = config, dtype, device, called_at
        self._detokenizer = Detokenizer(tokenizer.decode if tokenizer else lambda ids: "", request.prompt)
        self._stops = StopStrings(request.params.stop)
        self._kv_bytes = self._kv_entries = 0
        self._layer_tokens: tuple[int, ...] = ()
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._times: list[float] = []
        self._finish_reason = "interrupted"

    def prefilled(self, kv_bytes: int, kv_entries: int, layer_tokens: Sequence[int]) -> None:
        """Book what the prefill has kept, and how many tokens each layer saw."""
        self._kv_bytes, self._kv_entries, self._layer_tokens = kv_bytes, kv_entries, tuple(layer_tokens)

    def take(self, token_id: int) -> tuple[Piece, bool]:
        """Book a new token; the piece to emit, and whether it is the last one."""
        self._times.append(time.perf_counter())
        self._token_ids.append(token_id)
        text = "" if token_id in self.request.eos_ids else self._detokenizer.push(token_id)
        text, stopped = self._stops.push(text)
        if stopped or token_id in self.request.eos_ids:
            self._finish_reason = "stop"
        elif len(self._token_ids) == self.request.max_tokens:
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
        text, token_ids = "".join(self._text), list(self._token_ids)
        return Output(text, token_ids, self._finish_reason, self._metrics(), self._run())

    def _run(self) -> RunInfo:
        policy, n_layers = self.request.policy, self._config.n_layers
        first = policy.first_pass(n_layers, len(self.request.prompt))
        return RunInfo(
            policy=policy.name,
            settings=policy.settings(n_layers),
            device=str(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            first_pass_layer=None if first is None else first.layer,
        )

    def _metrics(self) -> Metrics:
        request, config, times = self.request, self._config, self._times
        n_prompt, n_new = len(request.prompt), len(self._token_ids)
        heads = config.n_layers * config.n_kv_heads
        full = KVCache.size_of([n_prompt] * config.n_layers, request.max_tokens, config.n_kv_heads, config.head_dim)
        return Metrics(
            prompt_tokens=n_prompt,
            new_tokens=n_new,
            ttft_s=times[0] - self._called_at if times else 0.0,
            decode_tokens_per_s=(n_new - 1) / (times[-1] - times[0]) if n_new > 1 else None,
            kv_tokens=round(self._kv_entries / heads),
            kv_entries=self._kv_entries,
            kv_full_entries=n_prompt * heads,
            kv_bytes=self._kv_bytes,
            kv_full_bytes=full * self._dtype.itemsize,
            tsp_tokens=self._layer_tokens[-1] if self._layer_tokens else n_prompt,
            layer_tokens=self._layer_tokens,
            peak_bytes=self.peak,
        )
