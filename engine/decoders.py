"""Who makes the next token of each row: the interface that eager decoding and replayed graphs share, and the former."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.engine.decode import decode_step
from fastkv.engine.sampler import Sampler, SamplingParams
from fastkv.models.llama import Llama


class Decoder(Protocol):
    """The texts of R rows, each in a cache of its own: the first token from the prefill's logits, the others by steps.

    tokens: int64 [R] on the device, the last token of each row; the same tensor all the time.
    """

    tokens: Tensor

    def start(self, row: int, cache: KVCache, params: SamplingParams, prompt: Tensor) -> None:
        """Begin a text behind `prompt`, int64 [1, N]."""

    def first(self, row: int, logits: Tensor) -> None:
        """Choose the first token of a row, from logits float32 [1, V]."""

    def step(self, rows: Sequence[int]) -> None:
        """Append the last token of these rows to their caches, and choose the next one of each."""

    def stop(self, row: int) -> None:
        """The text has ended."""


class EagerDecoder:
    """One kernel after another, as the code reads."""

    def __init__(self, model: Llama, n_rows: int) -> None:
        self._model = model
        self.tokens = torch.zeros(n_rows, dtype=torch.int64, device=model.device)
        self._texts: dict[int, tuple[KVCache, Sampler]] = {}

    def start(self, row: int, cache: KVCache, params: SamplingParams, prompt: Tensor) -> None:
        sampler = Sampler(params, 1, self._model.config.vocab_size, self._model.device)
        sampler.start(prompt, params.seed)
        self.take_over(row, cache, sampler)

    def take_over(self, row: int, cache: KVCache, sampler: Sampler) -> None:
        """Go on with a text that another decoder has begun."""
        self._texts[row] = (cache, sampler)

    def first(self, row: int, logits: Tensor) -> None:
        self.tokens[row : row + 1] = self._texts[row][1](logits)

    def step(self, rows: Sequence[int]) -> None:
        caches = [self._texts[row][0] for row in rows]
        logits = decode_step(self._model, caches, torch.cat([self.tokens[row : row + 1] for row in rows]))
        for index, row in enumerate(rows):
            self.first(row, logits[index : index + 1])

    def stop(self, row: int) -> None:
        del self._texts[row]
