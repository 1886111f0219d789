"""What the requests of one loaded model share: the model, idle memory, and how its steps are run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.storage import KVStorage
from fastkv.engine.decode import decode_step
from fastkv.engine.graph import GraphDecoder, GraphError
from fastkv.engine.sampler import Sampler, SamplingParams
from fastkv.engine.workspace import BufferPool, Buffers
from fastkv.models.llama import Llama

_log = logging.getLogger(__name__)


class Decoder(Protocol):
    """Chooses the tokens of one text: the first from the prefill's logits, each other one by a step of the model."""

    def first(self, logits: Tensor) -> Tensor:
        """logits float32 [B, V] -> token ids int64 [B]."""

    def step(self, cache: KVCache, token: Tensor) -> Tensor:
        """The last token ids int64 [B], which the cache takes in -> the next ones."""


class EagerDecoder:
    """One kernel after another, as the code reads."""

    def __init__(self, model: Llama, sampler: Sampler) -> None:
        self._model = model
        self._sampler = sampler

    def first(self, logits: Tensor) -> Tensor:
        return self._sampler(logits)

    def step(self, cache: KVCache, token: Tensor) -> Tensor:
        return self._sampler(decode_step(self._model, cache, token))


@dataclass
class Runtime:
    """A model and its idle buffers.

    cuda_graph: decode by replaying captured graphs; only ever on a GPU. attention: the backend of causal attention.
    """

    model: Llama
    cuda_graph: bool
    attention: str
    pool: BufferPool = field(default_factory=BufferPool)
    _said_slow: bool = False

    @property
    def ahead(self) -> bool:
        """Whether a step is launched before the token of the last one is read: a GPU works on meanwhile."""
        return self.model.device.type == "cuda"

    def decoder(self, buffers: Buffers, params: SamplingParams, prompt: Tensor) -> Decoder:
        """The decoder for a text behind `prompt`, int64 [B, N], whose cache lies in these buffers."""
        if self.cuda_graph and buffers.storage is not None:
            try:
                return self._graph_decoder(buffers, buffers.storage, params, prompt)
            except GraphError as error:
                self._say_off(error)
        sampler = Sampler(params, prompt.shape[0], self.model.config.vocab_size, self.model.device)
        sampler.start(prompt, params.seed)
        return EagerDecoder(self.model, sampler)

    def eagerly(self, decoder: Decoder, error: GraphError) -> EagerDecoder:
        """What goes on in place of a decoder whose step could not be captured."""
        assert isinstance(decoder, GraphDecoder), "only graphs are captured"
        self._say_off(error)
        return EagerDecoder(self.model, decoder.sampler)

    def _graph_decoder(
        self, buffers: Buffers, storage: KVStorage, params: SamplingParams, prompt: Tensor
    ) -> GraphDecoder:
        if buffers.decoder is None:
            buffers.decoder = GraphDecoder(self.model, storage)
            if buffers.decoder.slow_because is not None and not self._said_slow:
                self._said_slow = True
                _log.warning(
                    "decoding attends with a mask, which is slow for long texts: %s", buffers.decoder.slow_because
                )
        buffers.decoder.start(params, prompt)
        return buffers.decoder

    def _say_off(self, error: GraphError) -> None:
        self.cuda_graph = False
        _log.warning("CUDA graphs are off, decoding is slower: %s", error)
