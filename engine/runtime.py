"""What the requests of one loaded model share: the model, idle memory, and how its steps are run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fastkv.engine.decoders import Decoder, EagerDecoder
from fastkv.engine.graph import GraphDecoder, GraphError
from fastkv.engine.workspace import BufferPool, Buffers
from fastkv.models.llama import Llama

_log = logging.getLogger(__name__)


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
        """Whether a step is launched before the tokens of the last one are read: a GPU works on meanwhile."""
        return self.model.device.type == "cuda"

    def decoder(self, buffers: Buffers) -> Decoder:
        """The decoder for texts whose caches lie in the storage of these buffers."""
        assert buffers.storage is not None, "the storage comes first"
        if not self.cuda_graph:
            return EagerDecoder(self.model, buffers.storage.batch)
        if buffers.decoder is None:
            buffers.decoder = GraphDecoder(self.model, buffers.storage)
            self._say_if_slow(buffers.decoder)
        return buffers.decoder

    def eagerly(self, decoder: Decoder, error: GraphError) -> Decoder:
        """What goes on in place of a decoder that could not be captured, with the texts that it has."""
        assert isinstance(decoder, GraphDecoder), "only graphs are captured"
        self.cuda_graph = False
        _log.warning("CUDA graphs are off, decoding is slower: %s", error)
        eager = EagerDecoder(self.model, len(decoder.tokens))
        eager.tokens.copy_(decoder.tokens)
        for row, (cache, sampler) in decoder.texts.items():
            eager.take_over(row, cache, sampler)
        return eager

    def _say_if_slow(self, decoder: GraphDecoder) -> None:
        if decoder.slow_because is not None and not self._said_slow:
            self._said_slow = True
            _log.warning("decoding attends with a mask, which is slow for long texts: %s", decoder.slow_because)
