"""Decode steps as replays of captured CUDA graphs: buckets of length and of slots, capture, replay.

The only file that knows of CUDA graphs. A step is two replays: the layers, from the last tokens to logits, in one graph
for each bucket of cache capacities and of slots; and the sampler for all slots, in one graph for each number of slots
and each set of filters that they need. Lengths, positions, tokens and the state of chance live on the device, so a
graph serves any sequences that fit into its bucket. What runs in a graph is the plain function `_layers` or `_choose`:
without a GPU, tests run it as it is.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from fastkv.cache.pool import bucket
from fastkv.engine.decode import run_layers
from fastkv.engine.decode_attention import GraphAttention, graph_attention
from fastkv.engine.sampler import Features
from fastkv.engine.step import Caches, SlotState
from fastkv.models.llama import Llama

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]  # what to do -> something that does it again

_WARM_UPS = 2  # runs before the capture: libraries allocate and choose their kernels in them
_GRAPHS = 32  # that are kept, of each kind
_CAPTURING = threading.Lock()  # there is one stream to capture on


class GraphError(RuntimeError):
    """A step could not be captured. Nothing has changed: the step can still be made eagerly."""


class GraphStepper:
    """A Stepper (engine/step.py) whose steps are replayed.

    slow_because: why the fast attention is not used (None: it is). record: runs a function to warm it up, then captures
    it; None is the real thing.
    """

    def __init__(self, model: Llama, state: SlotState, record: Record | None = None) -> None:
        n_slots, device = state.pool.n_slots, model.device
        self._model, self._state = model, state
        self._record = _CudaRecorder(device) if record is None else record
        self._attention, self.slow_because = graph_attention(state.pool, model.config.n_heads)
        self._logits = torch.zeros(n_slots, model.config.vocab_size, device=device)
        self._active = torch.zeros(n_slots, dtype=torch.int64, device=device)  # 1 for the slots of this step
        self._marked: tuple[int, ...] = ()  # the same, on the host
        self._steps: dict[tuple[Any, ...], tuple[Replay, GraphAttention]] = {}
        self._choices: dict[tuple[int, Features], Replay] = {}
        self._reserved, self._tables = 0, self._model.rotary.tables

    @torch.inference_mode()
    def step(self, caches: Caches) -> None:
        """See Stepper. Raises FastKVError when a cache or the context is full, and GraphError."""
        for cache in caches.values():
            cache.check_room()
        n_slots = self._slots_for(1 + max(caches))
        layers, choose = self._layers_of(n_slots), self._choice_of(n_slots)
        self._mark(tuple(caches))
        layers()
        for cache in caches.values():
            cache.advance(on_device=False)
        choose()

    def _slots_for(self, wanted: int) -> int:
        """To the next power of two, so that few graphs serve any number of sequences."""
        return min(1 << (wanted - 1).bit_length(), self._state.pool.n_slots)

    def _mark(self, slots: tuple[int, ...]) -> None:
        """Say on the device which slots a step is for: the others compute along, and nothing comes of it."""
        if slots != self._marked:
            self._active.zero_()  # filled in place: a copy from the host would wait for the device
            for slot in slots:
                self._active[slot].fill_(1)
            self._marked = slots

    def _layers_of(self, n_slots: int) -> Replay:
        if self._model.rotary.reserved != self._reserved:  # a graph holds the address of the table that was there
            self._steps.clear()
            self._reserved = self._model.rotary.reserved
            self._tables = self._model.rotary.tables  # alive as long as the graphs: another thread may let it grow
        spans = tuple(self._span(layer, n_slots) for layer in range(len(self._state.pool.layers)))
        key = (n_slots, *spans)
        if key not in self._steps:
            _make_room(self._steps)
            attention = self._attention(self._state.pool, n_slots, spans, self._model.config.windows)
            self._mark(())  # warmed up for no slot at all: nothing is counted
            # The graph reads the attention's tensors, which must live as long.
            self._steps[key] = self._record(lambda: self._layers(n_slots, attention)), attention
        return self._steps[key][0]

    def _span(self, layer: int, n_slots: int) -> int:
        storage = self._state.pool.layers[layer]
        return bucket(max(storage.span(slot) for slot in range(n_slots)))

    def _choice_of(self, n_slots: int) -> Replay:
        key = (n_slots, self._state.sampler.features)
        if key not in self._choices:
            _make_room(self._choices)
            self._mark(())
            self._choices[key] = self._record(lambda: self._choose(*key))
        return self._choices[key]

    def _layers(self, n_slots: int, attention: GraphAttention) -> None:
        """From the last tokens of the first slots to their logits. The slots of this step get one entry more."""
        pool = self._state.pool
        ids = self._state.tokens[:n_slots].clamp_min(0).unsqueeze(1)  # what was not finite is no token: see Sampler
        positions = pool.next_position[:n_slots].unsqueeze(1)
        attention.begin()
        self._logits[:n_slots] = run_layers(self._model, ids, positions, attention)[:, 0]
        active = self._active[:n_slots]
        pool.lengths[:, :n_slots].add_(active.unsqueeze(1))
        pool.next_position[:n_slots].add_(active)

    def _choose(self, n_slots: int, features: Features) -> None:
        """The next token of the slots of this step, from their logits."""
        tokens, active = self._state.tokens[:n_slots], self._active[:n_slots]
        chosen = self._state.sampler.sample(self._logits[:n_slots], active, features)
        tokens.copy_(torch.where(active > 0, chosen, tokens))


def _make_room(kept: dict[Any, Any]) -> None:
    """Forget the oldest where there are as many as may be."""
    if len(kept) >= _GRAPHS:
        del kept[next(iter(kept))]


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one side stream of a device for warm-ups and captures: libraries keep memory for every stream they meet."""
    return torch.cuda.Stream(device)


class _CudaRecorder:
    """Warms up, then captures into CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        try:
            with _CAPTURING, torch.cuda.device(self._device):
                self._warm_up(run)
                return self._capture(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise GraphError(str(error).splitlines()[0]) from error

    def _warm_up(self, run: Callable[[], None]) -> None:
        stream, current = _stream_of(self._device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        current.wait_stream(stream)

    def _capture(self, run: Callable[[], None]) -> Replay:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=_stream_of(self._device), capture_error_mode="thread_local"
            ):
                run()
        finally:
            torch.cuda.set_stream(current)  # where ending a capture fails, torch leaves its own stream current
        return graph.replay
