"""What becomes of one request, token by token: its text, its end, its figures. Knows no other request."""

from __future__ import annotations

import time

from fastkv.cache.mass import LayerMass, shares
from fastkv.cache.reader import Reader
from fastkv.engine.output import Metrics, Output, Piece, RunInfo
from fastkv.engine.prefill import Prefill
from fastkv.engine.request import Request
from fastkv.engine.shared_layers import pairs_of
from fastkv.engine.speculation.figures import Speculated
from fastkv.engine.stopping import StopStrings
from fastkv.models.llama import Llama
from fastkv.models.text.detokenizer import Detokenizer
from fastkv.models.text.tokenizer import Tokenizer

_CONTEXT = 16  # tokens of the prompt's end: more than the text of the next token can depend on


class Answer:
    """Books the tokens of a request as they come, until `take` says that one was the last.

    called_at: time.perf_counter() when the user asked. token_ids: those that came. peak: bytes, set when the request
    has run. speculated: set by what runs it, if it speculates.
    """

    peak: int | None = None
    speculated: Speculated | None = None

    def __init__(self, model: Llama, tokenizer: Tokenizer | None, request: Request, called_at: float) -> None:
        self.request = request
        self._config, self.called_at = model.config, called_at
        self._device, self._dtype = str(model.device), model.precision
        last_ids = request.all_ids[0, -_CONTEXT:].tolist()
        self._detokenizer = Detokenizer(tokenizer, last_ids)
        self._stops = StopStrings(request.params.stop)
        self._kv_bytes = 0
        self._layer_entries: tuple[int, ...] = ()
        self._reader: Reader | None = None
        self._layer_tokens: tuple[int, ...] = ()
        self._mass: list[LayerMass | None] = []
        self.token_ids: list[int] = []
        self._text: list[str] = []
        self._times: list[float] = []
        self._finish_reason = "interrupted"

    def prefilled(self, result: Prefill) -> None:
        """Book what the prefill has kept, and how many tokens each layer saw."""
        plan, self._reader = self.request.plan, result.cache.reader
        self._kv_bytes, self._layer_entries = plan.nbytes + plan.index_nbytes, result.cache.layer_entries
        self._layer_tokens = tuple(result.layer_tokens)
        self._mass = result.mass  # stays on the device: reading it would wait for the prefill
        turn, beginning = self.request.turn, self.request.beginning
        if beginning is not None:
            self._layer_tokens = tuple(map(sum, zip(beginning.layer_tokens, result.layer_tokens, strict=True)))
        before = beginning if turn is None else turn.held.snapshot
        if before is not None and before.whole_from:
            self._mass = [None] * len(result.mass)  # what was dropped earlier is not in it

    def take(self, token_id: int) -> tuple[Piece, bool]:
        """Book a new token; the piece to emit, and whether it is the last one."""
        self._times.append(time.perf_counter())
        self.token_ids.append(token_id)
        text = "" if token_id in self.request.eos_ids else self._detokenizer.push(token_id)
        text, stopped = self._stops.push(text)
        if stopped or token_id in self.request.eos_ids:
            self._finish_reason = "stop"
        elif len(self.token_ids) == self.request.max_tokens:
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

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def output(self) -> Output:
        """Text, tokens and figures so far."""
        return Output(self.text, list(self.token_ids), self._finish_reason, self._metrics(), self._run())

    def _run(self) -> RunInfo:
        policy, first, budget = self.request.policy, self.request.plan.first_pass, self.request.plan.decode_budget
        offload = self.request.plan.offload
        return RunInfo(
            policy=policy.name,
            settings=policy.settings(self._config.n_layers),
            device=self._device,
            dtype=self._dtype,
            first_pass_layer=None if first is None else first.layer,
            decode_budget=None if budget is None else budget.entries,
            kv_dtype=self.request.plan.layout.kv_dtype,
            shared_layers=pairs_of(self.request.plan.shared),
            ranks=self._config.n_ranks,
            offloaded_layers=0 if offload is None else offload.layers,
        )

    def _read_bytes(self) -> int | None:
        """See Metrics.read_bytes."""
        if self._reader is not None and self._reader.steps:
            return sum(self._reader.read_bytes) // self._reader.steps
        steps, plan = len(self.token_ids) - 1, self.request.plan
        if self._reader is not None or steps < 1 or plan.evicts is not None:
            return None
        if plan.layout.kv_dtype is not None or self.request.speculation is not None:
            return None  # entries of several sizes, or several tokens at a time, from two caches
        appended = self._config.n_layers * self._config.n_kv_heads * (1 + steps) // 2  # by each step one more
        shared = plan.shared or range(self._config.n_layers)
        read = sum(self._layer_entries[source] for source in shared)
        return (read + appended) * 2 * plan.shape.head_dim * plan.shape.dtype.itemsize

    def _metrics(self) -> Metrics:
        plan, times = self.request.plan, self._times
        n_prompt, n_new = self.request.n_prompt, len(self.token_ids)
        together, each = shares(self._mass)
        heads, kv_entries = self._config.n_layers * self._config.n_kv_heads, sum(self._layer_entries)
        whole = n_prompt + (0 if self.request.turn is None else self.request.n_reused)
        return Metrics(
            prompt_tokens=n_prompt,
            new_tokens=n_new,
            ttft_s=times[0] - self.called_at if times else 0.0,
            decode_tokens_per_s=(n_new - 1) / (times[-1] - times[0]) if n_new > 1 else None,
            kv_tokens=round(kv_entries / heads),
            kv_entries=kv_entries,
            kv_full_entries=whole * heads,
            kv_bytes=self._kv_bytes,
            kv_full_bytes=plan.full_nbytes,
            tsp_tokens=self._layer_tokens[-1] if self._layer_tokens else n_prompt,
            layer_tokens=self._layer_tokens,
            peak_bytes=self.peak,
            attention_kept=together,
            layer_attention=each,
            reused_tokens=self.request.n_reused,
            speculation=self.speculated,
            layer_entries=self._layer_entries,
            read_bytes=self._read_bytes(),
        )
