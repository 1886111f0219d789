"""Decode steps as replays of captured CUDA graphs: static buffers, buckets of length and of rows, capture, replay.

The only file that knows of CUDA graphs. A step is a replay of the layers, from the last tokens to logits, in one graph
for each bucket of cache capacities and of rows; and for each row a replay that chooses its next token, in one graph for
each set of sampling settings. Lengths, positions, tokens and the state of chance live on the device, so a graph serves
any prompts that fit into its bucket. What runs in a graph is the plain function `_layers` or `choose`: without a GPU,
tests run it as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.storage import KVStorage, bucket
from fastkv.engine.decode import one_token
from fastkv.engine.sampler import Sampler, SamplingParams
from fastkv.engine.slot_attention import SlotAttention, slot_attention
from fastkv.models.llama import Llama

Replay = Callable[[], None]
# (what to do, the generator that it draws from) -> something that does it again
Record = Callable[[Callable[[], None], "torch.Generator | None"], Replay]

_WARM_UPS = 2  # runs before the capture: libraries allocate and choose their kernels in them
_STEPS, _SAMPLERS = 32, 64  # graphs that are kept, of each kind


class GraphError(RuntimeError):
    """A step could not be captured. Nothing has changed: the step can still be made eagerly."""


class GraphDecoder:
    """A Decoder (engine/decoders.py) for texts whose caches are rows of `storage`.

    texts: cache and sampler of each row at work. slow_because: why the fast attention is not used (None: it is).
    record: runs a function to warm it up, then captures it; None is the real thing.
    """

    def __init__(self, model: Llama, storage: KVStorage, record: Record | None = None) -> None:
        n_rows, device = storage.batch, model.device
        self._model = model
        self._storage = storage
        self._record = _CudaRecorder(device) if record is None else record
        _, self.slow_because = slot_attention(storage, model.config.n_heads)
        self.tokens = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self.texts: dict[int, tuple[KVCache, Sampler]] = {}
        self._clean: dict[int, list[int]] = {}  # of each of them the slots of every layer that it filled or cleared
        self._logits = torch.zeros(n_rows, model.config.vocab_size, device=device)
        self._stepping = torch.zeros(n_rows, dtype=torch.int64, device=device)  # 1 for the rows of this step
        self._stepping_rows: tuple[int, ...] = ()
        self._steps: dict[tuple[Any, ...], tuple[Replay, SlotAttention]] = {}
        self._samplers: dict[tuple[int, SamplingParams], tuple[Sampler, Replay]] = {}
        self._choices: dict[int, Replay] = {}
        self._reserved = 0

    @torch.inference_mode()
    def start(self, row: int, cache: KVCache, params: SamplingParams, prompt: Tensor) -> None:
        """Begin a text behind `prompt`, int64 [1, N]. Raises GraphError."""
        key = (row, _settings_of_choice(params))
        if key not in self._samplers:
            _make_room(self._samplers, _SAMPLERS)
            self._samplers[key] = self._recorded_sampler(*key)
        sampler, self._choices[row] = self._samplers[key]
        sampler.start(prompt, params.seed)
        self.texts[row] = (cache, sampler)
        self._clean[row] = [bucket(span) for span in cache.spans]

    @torch.inference_mode()
    def first(self, row: int, logits: Tensor) -> None:
        """Choose the first token of a row, from logits float32 [1, V]."""
        self._logits[row : row + 1] = logits
        self._choices[row]()

    @torch.inference_mode()
    def step(self, rows: Sequence[int]) -> None:
        """Append the last token of these rows to their caches, and choose the next one of each.

        Raises FastKVError when a cache or the context is full, and GraphError.
        """
        caches = [self.texts[row][0] for row in rows]
        for cache in caches:
            cache.check_room()
        replay = self._step_of(1 + max(rows))
        self._mark(tuple(rows))
        replay()
        for cache in caches:
            cache.appended += 1  # the device has counted for itself
        for row in rows:
            self._choices[row]()

    def stop(self, row: int) -> None:
        """The text has ended."""
        del self.texts[row], self._choices[row], self._clean[row]
        self._storage.lengths[:, row] = 0  # what computes along has nothing to attend to

    def _mark(self, rows: tuple[int, ...]) -> None:
        """Say on the device which rows a step is for: the others compute along, and nothing comes of it."""
        if rows != self._stepping_rows:
            self._stepping.zero_()  # filled in place: a copy from the host would wait for the device
            for row in rows:
                self._stepping[row].fill_(1)
            self._stepping_rows = rows

    def _step_of(self, n_rows: int) -> Replay:
        if self._model.rotary.reserved != self._reserved:  # a graph holds the address of the table that was there
            self._steps.clear()
            self._reserved = self._model.rotary.reserved
        rows = min(1 << (n_rows - 1).bit_length(), self._storage.batch)
        caches = [cache for cache, _ in self.texts.values()]
        spans = [bucket(max(layer)) for layer in zip(*(cache.spans for cache in caches), strict=True)]
        self._clean_up_to(spans)
        ragged = any(cache.ragged for cache in caches)
        key = (rows, ragged, *spans)
        if key not in self._steps:
            _make_room(self._steps, _STEPS)
            self._steps[key] = self._recorded_step(self._storage.rows(0, rows), spans, ragged)
        return self._steps[key][0]

    def _clean_up_to(self, spans: list[int]) -> None:
        """Zeros in the slots that a text beside it makes a step read, of every text at work.

        What an earlier text left there could be infinite, and a weight of zero would not hide it.
        """
        for row, clean in self._clean.items():
            for layer, (first, end) in enumerate(zip(clean, spans, strict=True)):
                if first < end:
                    self._storage.k[layer][row, :, first:end].zero_()
                    self._storage.v[layer][row, :, first:end].zero_()
                    clean[layer] = end

    def _recorded_step(self, storage: KVStorage, spans: list[int], ragged: bool) -> tuple[Replay, SlotAttention]:
        """The attention comes along: the graph reads its tensors, which must live as long."""
        attention, _ = slot_attention(storage, self._model.config.n_heads, ragged)
        # Warmed up for no row at all: entries go to the slots that the next step fills, and nobody counts them.
        self._mark(())
        return self._record(lambda: self._layers(storage, spans, attention), None), attention

    def _recorded_sampler(self, row: int, settings: SamplingParams) -> tuple[Sampler, Replay]:
        sampler = Sampler(settings, 1, self._model.config.vocab_size, self._model.device)
        token, logits = self.tokens[row : row + 1], self._logits[row : row + 1]

        def choose() -> None:
            token.copy_(sampler(logits))

        before = token.clone()
        replay = self._record(choose, sampler.generator if settings.temperature > 0 else None)
        token.copy_(before)
        return sampler, replay

    def _layers(self, storage: KVStorage, spans: list[int], attention: SlotAttention) -> None:
        """From the last tokens of the storage's rows to their logits. The rows of this step get one entry more."""
        config, n_rows = self._model.config, storage.batch
        attention.begin()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            storage.write(layer, k, v)
            return attention(layer, q, spans[layer], config.window_of(layer))

        self._logits[:n_rows] = one_token(self._model, self.tokens[:n_rows], storage.next_position, attend)
        storage.lengths.add_(self._stepping[:n_rows].unsqueeze(1))
        storage.next_position.add_(self._stepping[:n_rows])


def _settings_of_choice(params: SamplingParams) -> SamplingParams:
    """Only what decides how a token is chosen, so that requests which differ in the rest share a graph."""
    if params.temperature == 0:
        return SamplingParams(repetition_penalty=params.repetition_penalty)
    return dataclasses.replace(params, max_tokens=None, seed=None, stop=(), ignore_eos=False)


def _make_room(kept: dict[Any, Any], most: int) -> None:
    """Forget the oldest where there are as many as may be."""
    if len(kept) >= most:
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

    def __call__(self, run: Callable[[], None], generator: torch.Generator | None) -> Replay:
        try:
            with torch.cuda.device(self._device):
                self._warm_up(run)
                return self._capture(run, generator)
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

    def _capture(self, run: Callable[[], None], generator: torch.Generator | None) -> Replay:
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=_stream_of(self._device), capture_error_mode="thread_local"
        ):
            run()
        return graph.replay
