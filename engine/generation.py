"""One request as an iterator: prefill, then a token at a time until something stops it."""

from __future__ import annotations

import dataclasses
import time

from torch import Tensor

from fastkv.engine.answer import Answer
from fastkv.engine.decode_batch import DecodeBatch
from fastkv.engine.memory import explain_out_of_memory, peak_bytes
from fastkv.engine.one_reader import OneReader
from fastkv.engine.output import Metrics, Output, Piece
from fastkv.engine.prefix_store import PrefixStore
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime
from fastkv.engine.speculation.speculative import SpeculativeBatch
from fastkv.errors import FaultError
from fastkv.kernels.out_of_memory import REQUEST
from fastkv.models.text.tokenizer import Tokenizer


class Generation(OneReader[Piece]):
    """Runs a request as it is iterated. `output()` tells what came of it, at the end or wherever it was left.

    `close()` ends it early and hands its memory on; so does its last token. Forgetting it lets the memory go. Of a turn
    of a session, the session has what was read and answered so far once the stream has ended, or was closed. One
    thread reads it at a time: FastKVError for a second one at the same moment. Any thread may close it.

    selection: where that was asked for, and from the first token on, what `LLM.prefill` returns as (tokens, kept).
    """

    selection: tuple[list[Tensor], list[Tensor]] | None = None

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        request: Request,
        called_at: float | None = None,
        keep_selection: bool = False,
        store: PrefixStore | None = None,
        drafting: Runtime | None = None,
    ) -> None:
        super().__init__()
        # time.perf_counter() when the user asked, if that was before now
        asked = time.perf_counter() if called_at is None else called_at
        self._runtime = runtime
        self._answer = Answer(runtime.model, tokenizer, request, asked)
        self._batch: DecodeBatch | None = None
        self._slot = 0
        self._failed = False
        self._keep_selection = keep_selection
        self._store = store  # which is to keep what the prompt leaves
        self._drafting = drafting  # what drafts run on, if the model drafts

    @property
    def prompt_ids(self) -> list[int]:
        """The token ids of the prompt, and of what a session had before it."""
        return self._answer.request.all_ids[0].tolist()

    def read_only(self) -> Metrics:
        """Read the prompt, make no token, and end. ttft_s: how long that took, from the call."""
        with explain_out_of_memory(REQUEST):
            self._batch = self._begin()
        self.close()
        return dataclasses.replace(self._answer.output().metrics, ttft_s=time.perf_counter() - self._answer.called_at)

    def _next(self) -> Piece:
        try:
            token_id = self._next_token()
        except FaultError:
            self._failed = self._ended = True  # what would come after a token that is none means nothing
            raise
        except Exception:
            self._failed = True
            self._ended = self._ended or self._answer.request.turn is not None  # its session is free again
            raise
        piece, finished = self._answer.take(token_id)
        if finished:
            self._answer.peak = peak_bytes(self._runtime.model.device)
            self._ended = True
        return piece

    def _next_token(self) -> int:
        with explain_out_of_memory(REQUEST):
            if self._batch is None:
                self._batch = self._begin()  # the first token is handed over before anything else is begun
            else:
                self._batch.launch_as_needed()
            ((_, token_id),) = self._batch.read()
        return token_id

    def _begin(self) -> DecodeBatch:
        request = self._answer.request
        batch = (
            DecodeBatch(self._runtime, [request])
            if request.speculation is None
            else SpeculativeBatch(self._runtime, request, self._drafting)
        )
        try:
            self._slot, result = batch.admit(request)
            if self._store is not None:
                self._store.keep(request.all_ids[0], result.cache)
            self._answer.prefilled(result)
        except BaseException:
            batch.close()
            raise
        if self._keep_selection:
            self.selection = (result.tokens, result.kept)
        return batch

    def _let_go(self) -> None:
        self._note()
        batch, self._batch = self._batch, None
        if batch is None:
            return
        try:
            if not self._failed:
                batch.finish(self._slot, self._answer.token_ids, self._answer.text)
        finally:
            batch.close()

    def output(self) -> Output:
        """Text, tokens and figures so far."""
        self._note()
        return self._answer.output()

    def _note(self) -> None:
        """Let the answer know what speculation has brought."""
        if isinstance(self._batch, SpeculativeBatch):
            self._answer.speculated = self._batch.figures()
