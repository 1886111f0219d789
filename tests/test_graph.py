"""The decode steps that a GPU replays, run here as the plain functions that they are, against the eager step.

What only a GPU can show (that the capture succeeds, and replays the same) is in tests/gpu.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastkv import LLM, AdaKV, FastKV, FastKVError, FullKV, SamplingParams, SnapKV
from fastkv.cache.policy import Policy
from fastkv.cache.storage import KVStorage
from fastkv.engine import graph
from fastkv.engine.graph import GraphDecoder, GraphError, Replay
from fastkv.engine.prefill import new_cache, prefill
from fastkv.engine.sampler import Sampler
from fastkv.engine.workspace import Workspace

PROMPT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(5)).tolist()
POLICIES = [  # the last two: layers differ; heads differ
    FullKV(),
    FastKV(min_tokens=8),
    FastKV(tsp_layer=1, tsp_len=20, kv_len=100),
    AdaKV(min_tokens=8),
]


class Recorder:
    """Stands in for the capture: counts the recordings, and replays by calling."""

    def __init__(self) -> None:
        self.recorded: list[Replay] = []
        self.replayed = 0

    def __call__(self, run: Callable[[], None], generator: torch.Generator | None) -> Replay:
        def replay() -> None:
            self.replayed += 1
            run()

        run()  # the warm-up
        self.recorded.append(replay)
        return replay


@pytest.fixture
def recorder(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Lets the model decode by replays, one step ahead, as on a GPU."""
    made = Recorder()
    runtime = tiny_llm._runtime
    monkeypatch.setattr(graph, "_CudaRecorder", lambda device: made)
    monkeypatch.setattr(type(runtime), "ahead", True)
    monkeypatch.setattr(runtime, "cuda_graph", True)
    monkeypatch.setattr(runtime, "_said_slow", False)
    runtime.pool.clear()
    yield made
    runtime.pool.clear()


def eager(llm: LLM, prompt: list[int], params: SamplingParams, policy: Policy) -> list[int]:
    """Token by token through `prefill` and `decode`."""
    assert params.max_tokens is not None
    sampler = Sampler(params, 1, llm.config.vocab_size, llm.device)
    sampler.start(torch.tensor([prompt]), params.seed)
    pre = llm.prefill(prompt, policy, params.max_tokens)
    tokens = [sampler(pre.logits)]
    while len(tokens) < params.max_tokens:
        tokens.append(sampler(llm.decode(pre.cache, tokens[-1])))
    return [int(token) for token in tokens]


CHOICES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 1.2, "seed": 4, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"repetition_penalty": 2.0},
]


def test_heads_of_other_lengths_leave_nothing_to_the_next_text(tiny_llm: LLM, recorder: Recorder) -> None:
    """The same slots and spans, for heads that differ and for heads that do not."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    policies = [FullKV(), SnapKV(kv_len=116), AdaKV(kv_len=52), SnapKV(kv_len=116)]
    found = [tiny_llm.generate(PROMPT, params, policy).token_ids for policy in policies]
    assert found == [eager(tiny_llm, PROMPT, params, policy) for policy in policies]


@pytest.mark.parametrize("policy", POLICIES, ids=["full", "fastkv", "layers differ", "heads differ"])
def test_a_text_beside_a_longer_one_reads_nothing_of_earlier_texts(
    tiny_llm: LLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    """A step reads as many slots of every row as the longest one has; what overflowed before would be NaN there."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    alone = [eager(tiny_llm, prompt, params, policy) for prompt in (PROMPT[:40], PROMPT)]
    allocate = KVStorage.allocate

    def poisoned(*args: Any, **kwargs: Any) -> KVStorage:
        made = allocate(*args, **kwargs)
        for buffer in [*made.k, *made.v]:
            buffer.fill_(torch.nan)
        return made

    monkeypatch.setattr(KVStorage, "allocate", poisoned)
    outs = tiny_llm.generate([PROMPT[:40], PROMPT], params, policy)
    assert [out.token_ids for out in outs] == alone


@pytest.mark.parametrize("policy", POLICIES, ids=["full", "fastkv", "layers differ", "heads differ"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_replayed_steps_choose_the_eager_tokens(
    tiny_llm: LLM, recorder: Recorder, policy: Policy, choice: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, **choice)
    assert tiny_llm.generate(PROMPT, params, policy).token_ids == eager(tiny_llm, PROMPT, params, policy)
    assert recorder.replayed == 39 + 40  # steps, and choices


def test_logits_of_a_replayed_step_are_the_eager_ones(tiny_llm: LLM, recorder: Recorder) -> None:
    for policy in POLICIES:
        tiny_llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), policy)  # records
        decoder = tiny_llm._runtime.pool._idle.decoder  # type: ignore[union-attr]
        pre = tiny_llm.prefill(PROMPT, policy, 3)
        tokens = tiny_llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), policy).token_ids
        for token in tokens[:2]:
            logits = tiny_llm.decode(pre.cache, torch.tensor([token]))
        torch.testing.assert_close(decoder._logits, logits, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


def test_one_recording_serves_many_prompts_and_lengths(tiny_llm: LLM, recorder: Recorder) -> None:
    policy = FastKV(min_tokens=8)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    longest = PROMPT * 3
    tiny_llm.generate(longest, params, policy)
    assert len(recorder.recorded) == 2  # the layers, and the choice
    for n_tokens in (899, 870, 840):
        prompt = longest[:n_tokens]
        assert tiny_llm.generate(prompt, params, policy).token_ids == eager(tiny_llm, prompt, params, policy)
    assert len(recorder.recorded) == 2
    tiny_llm.generate(longest, SamplingParams(max_tokens=20, temperature=0.5, seed=1), policy)
    assert len(recorder.recorded) == 3  # another way to choose
    tiny_llm.generate(longest, params, FullKV())
    assert len(recorder.recorded) == 5  # another size: new memory, and new recordings of both


def test_recording_leaves_no_trace_in_the_cache(tiny_llm: LLM, recorder: Recorder) -> None:
    """The warm-up runs the step for real: it writes an entry and counts it, and the count must go back."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    stream = tiny_llm.stream(PROMPT, params, FastKV(min_tokens=8))
    next(stream)
    assert stream._rows is not None
    cache = stream._rows._rows[0].cache
    assert cache.lengths.tolist() == [[[30, 30]]] * 6
    next(stream)  # records, and runs two steps: its own, and the one ahead
    assert cache.lengths.tolist() == [[[32, 32]]] * 6
    assert cache.next_position.tolist() == [302]
    assert cache.appended == 2


def test_a_step_ahead_is_neither_emitted_nor_beyond_the_room(tiny_llm: LLM, recorder: Recorder) -> None:
    """The step behind a stop is under way when the stop is found; behind the last token there is none."""
    tokens = eager(tiny_llm, PROMPT, SamplingParams(max_tokens=12), FullKV())
    out = tiny_llm.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True), FullKV())
    assert out.token_ids == tokens
    assert recorder.replayed == 11 + 12
    stop = next(token for token in tokens if tokens.index(token) >= 3)
    stopping = tiny_llm.stream(PROMPT, SamplingParams(max_tokens=12), FullKV())
    object.__setattr__(stopping._answer.request, "eos_ids", frozenset({stop}))
    assert [piece.token_id for piece in stopping] == tokens[: tokens.index(stop) + 1]
    assert stopping.output().finish_reason == "stop"


def test_two_streams_at_once_do_not_disturb_each_other(tiny_llm: LLM, recorder: Recorder) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=2, ignore_eos=True)
    prompts = [PROMPT, PROMPT[100:]]
    streams = [tiny_llm.stream(prompt, params, FullKV()) for prompt in prompts]
    pairs = list(zip(*streams, strict=True))
    for index, prompt in enumerate(prompts):
        assert [pair[index].token_id for pair in pairs] == eager(tiny_llm, prompt, params, FullKV())


@pytest.mark.parametrize("failing", ["layers", "choice"])
def test_where_nothing_can_be_captured_one_line_says_so(
    tiny_llm: LLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def fail(run: Callable[[], None], generator: torch.Generator | None) -> Replay:
        if (generator is not None) == (failing == "choice"):
            raise GraphError("operation not permitted when stream is capturing")
        return recorder(run, generator)

    monkeypatch.setattr(graph, "_CudaRecorder", lambda device: fail)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, repetition_penalty=1.5, ignore_eos=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = tiny_llm.generate(PROMPT, params, FullKV()).token_ids
            assert found == eager(tiny_llm, PROMPT, params, FullKV())
    lines = [record.getMessage() for record in caplog.records if "graphs" in record.getMessage()]
    assert lines == [
        "CUDA graphs are off, decoding is slower: operation not permitted when stream is capturing",
    ]


def test_a_replayed_step_checks_the_room(tiny_llm: LLM) -> None:
    model, ids = tiny_llm._model, torch.tensor([PROMPT])
    config = model.config
    storage = KVStorage.allocate(
        [320] * 6, 1, config.n_kv_heads, config.head_dim, dtype=torch.float32, device=torch.device("cpu")
    )
    cache = new_cache(model, FullKV(), ids, 1, 1000, storage)
    decoder = GraphDecoder(model, storage, Recorder())
    decoder.start(0, cache, SamplingParams(), ids)
    decoder.first(0, prefill(model, ids, FullKV(), cache, Workspace()).logits)
    decoder.step([0])
    with pytest.raises(FastKVError, match="room for max_tokens=1"):
        decoder.step([0])


def test_a_table_that_has_moved_is_recorded_anew(tiny_llm: LLM, recorder: Recorder) -> None:
    """A graph holds the address of the rotary table; when a longer text makes it grow, the old graph reads nothing."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    tiny_llm.generate(PROMPT, params, FullKV())
    assert len(recorder.recorded) == 2
    tiny_llm._model.reserve(tiny_llm._model.rotary.reserved + 1)
    tiny_llm.generate(PROMPT, params, FullKV())
    assert len(recorder.recorded) == 3  # the layers; the choice reads no table


def test_a_row_that_is_done_has_nothing_to_attend_to(tiny_llm: LLM, recorder: Recorder) -> None:
    """It computes along with the others, over lengths that may be beyond what their graph looks at."""
    prompts, lengths = [PROMPT, PROMPT[:40]], [2, 12]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in lengths]
    each = tiny_llm.generate_each(prompts, params, FullKV())
    assert next(each)[0] == 0
    storage = each.gi_frame.f_locals["rows"]._storage  # type: ignore[attr-defined]
    assert storage.lengths[:, 0].tolist() == [[0, 0]] * 6
    assert (storage.lengths[0, 1] > 0).all()
    assert next(each)[0] == 1


def test_a_prefill_that_fails_leaves_no_text_behind(
    tiny_llm: LLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers go back to the pool: a text that stayed there would widen every later step."""

    def fail(*arguments: Any) -> None:
        raise FastKVError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("fastkv.engine.rows.prefill", fail)
        with pytest.raises(FastKVError, match="no memory"):
            tiny_llm.generate([PROMPT, PROMPT], SamplingParams(max_tokens=2), FullKV())
    assert tiny_llm._runtime.pool._idle.decoder.texts == {}  # type: ignore[union-attr]


def test_what_a_graph_reads_lives_as_long_as_the_graph(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture forgets the function and keeps addresses: lengths and starts that only it had held were freed."""
    alive: list[weakref.ref[object]] = []
    real = graph.slot_attention

    def watched(storage: KVStorage, n_heads: int, ragged: bool = False) -> Any:
        attention, reason = real(storage, n_heads, ragged)
        alive.append(weakref.ref(attention))
        return attention, reason

    def forgetful(run: Callable[[], None], generator: torch.Generator | None) -> Replay:
        return lambda: None

    monkeypatch.setattr(graph, "slot_attention", watched)
    storage = KVStorage.allocate([320] * 6, 1, 2, 8, dtype=torch.float32, device=torch.device("cpu"))
    decoder = GraphDecoder(tiny_llm._model, storage, forgetful)
    ids = torch.tensor([PROMPT])
    decoder.start(0, new_cache(tiny_llm._model, FullKV(), ids, 4, 1000, storage), SamplingParams(), ids)
    decoder.step([0])
    gc.collect()
    assert alive[-1]() is not None
