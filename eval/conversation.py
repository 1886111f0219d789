"""A context that is read under a policy, and questions that come later: each is kept whole, and can be taken back.

The one place that says how a sequence goes on in an evaluation: `LLM.prefill` from the cache that the context left,
then `LLM.decode`, greedily.
"""

from __future__ import annotations

from collections.abc import Collection
from time import perf_counter

import torch
from torch import Tensor

from fastkv.cache.dense import DenseLayer
from fastkv.cache.policies import FullKV
from fastkv.cache.policy import Policy
from fastkv.cache.pool import bytes_of, round_up
from fastkv.engine.llm import LLM
from fastkv.engine.output import Metrics, Output, RunInfo
from fastkv.engine.prefill import Prefill
from fastkv.engine.sampler import not_finite_error
from fastkv.models.text.detokenizer import Detokenizer

_CONTEXT = 16  # tokens before an answer: more than its text can depend on


class Conversation:
    """A sequence that begins with a context, compressed once. What comes after it is kept whole under every policy.

    context: token ids. room: tokens that are expected after it; more are taken, at the price of a copy of the cache.
    context_s: seconds that reading the context took. Raises FastKVError as `LLM.prefill` does.
    """

    def __init__(self, llm: LLM, policy: Policy, context: list[int], room: int) -> None:
        self._llm, self._policy = llm, policy
        self._ids = list(context)  # the cache's own position counts fewer where a policy reads a selection only
        begun = perf_counter()
        read = llm.prefill(context, policy, max_tokens=room)
        self._most_likely(read.logits)  # waits for the device
        self.context_s = perf_counter() - begun
        self._cache = read.cache

    @property
    def position(self) -> int:
        """Tokens so far, whether they are kept or not."""
        return len(self._ids)

    def add(self, ids: list[int]) -> None:
        """Go on with these tokens, all of which are kept."""
        self._read(ids, 0)

    def ask(self, ids: list[int], max_tokens: int, ends: Collection[int] = ()) -> Output:
        """Go on with a question, and answer it greedily. ends: ids that end the answer, besides the model's own.

        The figures are those of a request whose prompt is all that stands before the answer; its first token is timed
        from the question on. attention_kept is None: nobody measures what the question would have attended to.
        """
        called_at = perf_counter()
        read = self._read(ids, max_tokens)
        entries, before = self._cache.entries, self.position
        eos = {*ends, *(self._llm.tokenizer.eos_ids if self._llm.tokenizer is not None else ())}
        text, token_ids, times = self._answer(read.logits, max_tokens, eos)
        reason = "stop" if token_ids[-1] in eos else "length"
        metrics = self._metrics(read, entries, before, max_tokens, [time - called_at for time in times])
        return Output(text, token_ids, reason, metrics, self._run())

    def rewind(self, position: int) -> None:
        """Forget what came after the first `position` tokens, as if it had never been; not into the context."""
        self._cache.truncate(self.position - position)
        del self._ids[position:]

    def _read(self, ids: list[int], answer: int) -> Prefill:
        room = max(answer, self._cache.room - len(ids))  # what was expected at the beginning stays expected
        read = self._llm.prefill(ids, FullKV(), max_tokens=room, cache=self._cache)
        self._ids += ids
        return read

    def _answer(self, logits: Tensor, max_tokens: int, eos: set[int]) -> tuple[str, list[int], list[float]]:
        """Text and tokens of an answer, and when each token was there."""
        detokenizer = Detokenizer(self._llm.tokenizer, self._ids[-_CONTEXT:])
        pieces, token_ids, times = [], list[int](), []
        while True:
            token_ids.append(self._most_likely(logits))
            times.append(perf_counter())
            if token_ids[-1] in eos:
                break
            pieces.append(detokenizer.push(token_ids[-1]))
            if len(token_ids) == max_tokens:
                break
            logits = self._llm.decode(self._cache, torch.tensor(token_ids[-1:]))
            self._ids.append(token_ids[-1])
        return "".join(pieces) + detokenizer.flush(), token_ids, times

    def _metrics(self, read: Prefill, entries: int, before: int, max_tokens: int, times: list[float]) -> Metrics:
        config = self._llm.config
        heads, full = config.n_layers * config.n_kv_heads, [round_up(before + max_tokens)] * config.n_layers
        return Metrics(
            prompt_tokens=before,
            new_tokens=len(times),
            ttft_s=times[0],
            decode_tokens_per_s=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            kv_tokens=round(entries / heads),
            kv_entries=entries,
            kv_full_entries=before * heads,
            kv_bytes=self._cache.nbytes,
            kv_full_bytes=bytes_of(DenseLayer, full, self._cache.pool.shape),
            tsp_tokens=read.layer_tokens[-1],
            layer_tokens=tuple(read.layer_tokens),
            peak_bytes=None,
        )

    def _run(self) -> RunInfo:
        settings = self._policy.settings(self._llm.config.n_layers)
        return RunInfo(self._policy.name, settings, str(self._llm.device), self._llm.model.precision)

    def _most_likely(self, logits: Tensor) -> int:
        """The token of greedy sampling: logits [1, V]. Raises FaultError where they are no numbers."""
        highest, token = logits[0].max(dim=0)
        if not torch.isfinite(highest):
            raise not_finite_error(self._llm.dtype)
        return int(token)
