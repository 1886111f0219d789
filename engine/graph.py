"""Decode steps as replays of captured CUDA graphs: static buffers, buckets of length, capture, replay.

The only file that knows of CUDA graphs. A step is two replays: the layers, from the last token to logits, in one graph
for each bucket of cache capacities; and the choice of the next token, in one graph for each set of sampling settings.
Lengths, positions, tokens and the state of chance live on the device, so a graph serves any prompt that fits into its
bucket. What runs in a graph is the plain function `_layers` or `_choose`: without a GPU, tests run it as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.storage import KVStorage, bucket
from fastkv.engine.decode import one_token
from fastkv.engine.sampler import Sampler, SamplingParams
from fastkv.engine.slot_attention import slot_attention
from fastkv.models.llama import Llama

Replay = Callable[[], None]
# (what to do, the generator that it draws from) -> something that does it again
Record = Callable[[Callable[[], None], "torch.Generator | None"], Replay]

_WARM_UPS = 2  # runs before the capture: libraries allocate and choose their kernels in them
_SAMPLERS = 8  # sets of sampling settings whose graph is kept


class GraphError(RuntimeError):
    """A step could not be captured. Nothing has changed: the step can still be made eagerly."""


class GraphDecoder:
    """Steps of whatever cache lies in `storage`, one cache at a time; `start` comes first.

    record: captures a function; None is the real thing.
    """

    def __init__(self, model: Llama, storage: KVStorage, record: Record | None = None) -> None:
        self._model = model
        self._storage = storage
        self._record = _CudaRecorder(model.device) if record is None else record
        self._attention, self.slow_because = slot_attention(storage, model.config.n_heads)
        self._token = torch.zeros(storage.batch, dtype=torch.int64, device=model.device)
        self._logits = torch.zeros(storage.batch, model.config.vocab_size, device=model.device)
        self._steps: dict[tuple[object, ...], Replay] = {}
        self._samplers: dict[SamplingParams, tuple[Sampler, Replay]] = {}
        self._current: tuple[Sampler, Replay] | None = None

    @torch.inference_mode()
    def start(self, params: SamplingParams, prompt: Tensor) -> None:
        """Begin a text behind `prompt`, int64 [B, N]. Raises GraphError."""
        settings = _settings_of_choice(params)
        if settings not in self._samplers:
            if len(self._samplers) == _SAMPLERS:
                del self._samplers[next(iter(self._samplers))]  # the oldest
            self._samplers[settings] = self._recorded_sampler(settings)
        self._current = self._samplers[settings]
        self.sampler.start(prompt, params.seed)

    @property
    def sampler(self) -> Sampler:
        """The one that chooses, as it stands."""
        assert self._current is not None, "start comes first"
        return self._current[0]

    @torch.inference_mode()
    def first(self, logits: Tensor) -> Tensor:
        """The token that `logits`, float32 [B, V], of the prefill lead to: int64 [B]."""
        self._logits.copy_(logits)
        self._choose()
        return self._token

    @torch.inference_mode()
    def step(self, cache: KVCache, token: Tensor) -> Tensor:
        """Append `token`, int64 [B], to the cache; the next one. The same tensor is written at every step.

        Raises FastKVError when the cache or the context is full, and GraphError.
        """
        cache.check_room()
        if token is not self._token:
            self._token.copy_(token)
        self._step_of(cache)()
        cache.appended += 1  # the device has counted for itself
        self._choose()
        return self._token

    def _choose(self) -> None:
        assert self._current is not None, "start comes first"
        self._current[1]()

    def _step_of(self, cache: KVCache) -> Replay:
        spans = [bucket(buffer.shape[2]) for buffer in cache.k]
        # A graph holds the address of the rotary table, which is another one when the table has grown.
        key = (*spans, self._model.rotary.reserved)
        if key not in self._steps:
            self._steps[key] = self._recorded_step(spans)
        return self._steps[key]

    def _recorded_step(self, spans: list[int]) -> Replay:
        lengths, positions = self._storage.lengths.clone(), self._storage.next_position.clone()

        def layers_and_back() -> None:
            self._layers(spans)
            # Back: a step that is not taken writes only to the slot that the next one fills.
            self._storage.lengths.copy_(lengths)
            self._storage.next_position.copy_(positions)

        _warm_up(layers_and_back, self._model.device)
        try:
            return self._record(lambda: self._layers(spans), None)
        finally:
            self._storage.lengths.copy_(lengths)
            self._storage.next_position.copy_(positions)

    def _recorded_sampler(self, settings: SamplingParams) -> tuple[Sampler, Replay]:
        sampler = Sampler(settings, self._storage.batch, self._model.config.vocab_size, self._model.device)

        def choose() -> None:
            self._token.copy_(sampler(self._logits))

        _warm_up(choose, self._model.device)
        return sampler, self._record(choose, sampler.generator)

    def _layers(self, spans: list[int]) -> None:
        """From self._token to self._logits, with one more entry in every layer."""
        storage, config = self._storage, self._model.config
        self._attention.begin()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            storage.write(layer, k, v)
            return self._attention(layer, q, spans[layer], config.window_of(layer))

        self._logits.copy_(one_token(self._model, self._token, storage.next_position, attend))
        storage.advance()


def _settings_of_choice(params: SamplingParams) -> SamplingParams:
    """Only what decides how a token is chosen, so that requests which differ in the rest share a graph."""
    if params.temperature == 0:
        return SamplingParams(repetition_penalty=params.repetition_penalty)
    return dataclasses.replace(params, max_tokens=None, seed=None, stop=(), ignore_eos=False)


def _warm_up(run: Callable[[], None], device: torch.device) -> None:
    """Run on a side stream, as a capture asks for."""
    if device.type != "cuda":
        run()
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)


class _CudaRecorder:
    """Captures into CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None], generator: torch.Generator | None) -> Replay:
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            if generator is not None:
                graph.register_generator_state(generator)
            try:
                # Other threads may go on using the device meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise GraphError(str(error).splitlines()[0]) from error
        return graph.replay
