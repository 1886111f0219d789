"""What the requests of one loaded model share: the model, idle memory, and how its steps are run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fastkv.engine.buffers import BufferPool, Buffers
from fastkv.engine.decode_attention import can_be_one_row
from fastkv.engine.graph import GraphError, GraphStepper
from fastkv.engine.step import EagerStepper, SlotState, Stepper
from fastkv.errors import FaultError
from fastkv.models.llama import Llama

_log = logging.getLogger(__name__)


@dataclass
class Runtime:
    """A model and its idle buffers.

    cuda_graph: decode by replaying captured graphs; only ever on a GPU. attention: the backend of causal attention.
    step_threads: of a CPU, for decode steps (None: as many as torch has).
    """

    model: Llama
    cuda_graph: bool
    attention: str
    step_threads: int | None = None
    buffers: BufferPool = field(default_factory=BufferPool)
    _said_slow: bool = False
    _said_eager: bool = False

    @property
    def ahead(self) -> bool:
        """Whether a step is launched before the tokens of the last one are read: a GPU works on meanwhile."""
        return self.model.device.type == "cuda"

    def stepper(self, buffers: Buffers, eager: str = "") -> Stepper:
        """What makes the steps of the sequences in the slots of these buffers.

        eager: what any of them has that neither a graph nor compiled attention can follow: entries that are dropped
        meanwhile, or chosen anew in each step. In words; empty where there is no such thing. Nor does a graph follow
        entries that are packed as they become old.
        """
        assert buffers.state is not None, "the slots come first"
        pool = buffers.state.pool
        kv_dtype, windows = pool.layout.kv_dtype, self.model.config.windows
        if not eager and kv_dtype is not None:
            unlike = not pool.layout.per_head and not can_be_one_row(pool, windows)  # by heads it is never compiled
            eager = f"{kv_dtype} entries" if self.cuda_graph or unlike else ""
        if eager:
            self._say_eager(eager, bool(pool.shared))
        if eager or not self.cuda_graph:
            return EagerStepper(self.model, buffers.state, self.step_threads)
        if buffers.stepper is None:
            stepper = GraphStepper(self.model, buffers.state)
            self._say_if_slow(stepper.slow_because)
            buffers.stepper = stepper
        return buffers.stepper

    def eagerly(self, state: SlotState, error: GraphError) -> Stepper:
        """What continues in place of a stepper that could not be captured. FaultError of one of several ranks."""
        if self.model.ranks is not None:  # the others have captured it, and go on with graphs
            raise FaultError(f"a step could not be captured as a CUDA graph: switch graphs off on all ranks ({error})")
        self.cuda_graph = False
        _log.warning("CUDA graphs are off, decoding is slower: %s", error)
        return EagerStepper(self.model, state)

    def _say_eager(self, why: str, shared: bool) -> None:
        if (self.cuda_graph or self.model.row is not None) and not self._said_eager:
            self._said_eager = True
            if self.cuda_graph or shared:
                kind = "CUDA graphs" if self.cuda_graph else "compiled steps"
                _log.warning("answers with %s are made without %s, which is slower", why, kind)
            else:
                _log.warning("answers with %s have attention that is not compiled, which is slower", why)

    def _say_if_slow(self, reason: str | None) -> None:
        if reason is not None and not self._said_slow:
            self._said_slow = True
            _log.warning("decoding attends with a mask, which is slow for long sequences: %s", reason)
