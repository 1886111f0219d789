"""Decoding without a prefill: caches full of random entries, after which the engine's own steps run.

A step costs what it costs whatever the values are, so minutes of prefill are spared. With old_ways.py the only file of
this folder that reaches into the engine: it replaces what `DecodeBatch` calls for a prefill, asks what makes its steps,
and switches a loaded model's kernels.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cost import wait_for
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastkv import LLM, SamplingParams
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Policy
from fastkv.engine import attention as attention_module
from fastkv.engine import decode_batch, graph
from fastkv.engine.decode_batch import DecodeBatch
from fastkv.engine.graph import GraphStepper
from fastkv.engine.memory import peak_bytes
from fastkv.engine.merged_attention import merged_attention
from fastkv.engine.plan import RequestPlan
from fastkv.engine.prefill import LayerRun, Prefill
from fastkv.models.llama import Llama

_UNCOUNTED = 8  # steps before those that count: the first ones capture


@dataclass(frozen=True)
class Decoded:
    """What came of some steps: seconds between tokens, of each step; seconds that captures took; the most memory."""

    intervals: list[float]
    capture_s: float
    peak_bytes: int | None
    kv_bytes: int
    graphs: bool
    attention: str


class Sequences:
    """`batch` sequences of `context` tokens, under way: `step` makes the next token of each.

    steps: how many of them there can be. Raises FastKVError or torch.OutOfMemoryError where they do not fit.
    """

    def __init__(self, llm: LLM, policy: Policy, context: int, batch: int, steps: int) -> None:
        self._llm = llm
        self.captures: list[float] = []
        params = SamplingParams(max_tokens=steps + 1, ignore_eos=True)
        request = llm._request([1] * context, params, policy)
        self._patches = ExitStack()
        self._patches.enter_context(_timed_captures(self.captures))
        self._patches.enter_context(patch.object(decode_batch, "prefill", _filled))
        self._batch: DecodeBatch | None = None
        try:
            self._batch = DecodeBatch(llm._runtime, [request] * batch, batch)
            results = [self._batch.admit(request)[1] for _ in range(batch)]
            self.kv_bytes = sum(result.cache.nbytes for result in results)
            for _ in range(batch):  # the first tokens, which no step makes
                self.step()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def step(self) -> None:
        """Launch what can be launched, and wait for the oldest tokens."""
        assert self._batch is not None, "closed"
        self._batch.launch_as_needed()
        self._batch.read()

    def runs(self) -> tuple[bool, str]:
        """Whether graphs are replayed, and which attention a step uses."""
        stepper = self._batch._stepper if self._batch is not None else None
        if not isinstance(stepper, GraphStepper):
            return False, "eager: scaled_dot_product_attention over the live entries"
        why = stepper.slow_because
        return True, "varlen" if why is None else f"masked ({why})"

    def close(self) -> None:
        if self._batch is not None:
            self._batch.close()
            self._batch = None
        self._patches.close()


def decode(llm: LLM, policy: Policy, context: int, batch: int = 1, steps: int = 48) -> Decoded:
    """Time `steps` steps of `batch` sequences, after some that do not count."""
    with Sequences(llm, policy, context, batch, _UNCOUNTED + steps) as sequences:
        for _ in range(_UNCOUNTED):
            sequences.step()
        times = [time.perf_counter()]
        for _ in range(steps):
            sequences.step()
            times.append(time.perf_counter())
        graphs, attention = sequences.runs()
        intervals = [later - earlier for earlier, later in itertools.pairwise(times)]
        peak = peak_bytes(llm.device)
        return Decoded(intervals, sum(sequences.captures), peak, sequences.kv_bytes, graphs, attention)


@torch.inference_mode()
def _filled(model: Llama, ids: Tensor, plan: RequestPlan, cache: KVCache, *_: Any) -> Prefill:
    """In place of a prefill: as many random entries as the policy keeps, and logits by chance."""
    model.reserve(plan.positions)
    cache.begin(whole=not plan.compresses, room=plan.max_tokens)
    for layer, sizes in enumerate(plan.layers):
        shape = (ids.shape[0], plan.shape.n_kv_heads, sizes.kept, plan.shape.head_dim)
        k, v = (torch.randn(shape, dtype=plan.shape.dtype, device=model.device) for _ in range(2))
        positions = torch.arange(sizes.kept, device=model.device).expand(shape[:3])
        cache.store(layer, k, v, None, positions)
    cache.end(plan.layers[0].seen, plan.position_limit)
    logits = torch.randn(ids.shape[0], model.config.vocab_size, device=model.device)
    return Prefill(logits, [], [], cache)


@contextmanager
def _timed_captures(seconds: list[float]) -> Iterator[None]:
    """Add what each capture took, its warm-ups included, to `seconds`."""
    real = graph._CudaRecorder.__call__

    def timed(self: Any, run: Callable[[], None]) -> Callable[[], None]:
        wait_for(self._device)
        started = time.perf_counter()
        replay = real(self, run)
        wait_for(self._device)
        seconds.append(time.perf_counter() - started)
        return replay

    with patch.object(graph._CudaRecorder, "__call__", timed):
        yield


@contextmanager
def switched(llm: LLM, attention: str | None = None, cuda_graph: bool | None = None) -> Iterator[None]:
    """Other kernels for a while, with the same weights. None: as the model was made.

    Afterwards everything is as before, graphs too, should they have been given up.
    """
    runtime = llm._runtime
    before = runtime.attention, runtime.cuda_graph
    llm.free_buffers()
    runtime.attention = before[0] if attention is None else attention
    runtime.cuda_graph = before[1] if cuda_graph is None else cuda_graph
    try:
        yield
    finally:
        runtime.attention, runtime.cuda_graph = before
        llm.free_buffers()


@contextmanager
def attention_kernels() -> Iterator[Counter[str]]:
    """Counts which kernels torch chooses for the attention that is computed meanwhile: "flash_attention": 32.

    Attention from two parts (engine/merged_attention.py), which asks torch for no choice, is "merged".
    """
    real, seen = F.scaled_dot_product_attention, Counter[str]()

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        known = {"is_causal": more.get("is_causal", False), "enable_gqa": more.get("enable_gqa", False)}
        chosen = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, **known)
        seen[SDPBackend(chosen).name.lower()] += 1
        return real(q, k, v, attn_mask=attn_mask, **more)

    def merged(*given: Tensor) -> Tensor:
        seen["merged"] += 1
        return merged_attention(*given)

    with (
        patch.object(F, "scaled_dot_product_attention", watched),
        patch.object(attention_module, "merged_attention", merged),
    ):
        yield seen


@contextmanager
def layer_times(llm: LLM, tell: Callable[[int, float], None]) -> Iterator[None]:
    """`tell(layer, seconds)` when a prefill is done with a layer. The device is waited for there."""
    real = LayerRun.layer

    def timed(self: LayerRun, layer: int, *rest: Any) -> Any:
        started = time.perf_counter()
        result = real(self, layer, *rest)
        wait_for(llm.device)
        tell(layer, time.perf_counter() - started)
        return result

    with patch.object(LayerRun, "layer", timed):
        yield
