"""The decode steps that a GPU replays, run here as the plain functions that they are, against the eager step.

What only a GPU can show (that the capture succeeds, and replays the same) is in tests/gpu.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from caches import idle_pool, let_overflow
from torch import Tensor

from fastkv import LLM, AdaKV, DefensiveKVLayer, FastKV, FastKVError, FullKV, SamplingParams, SnapKV
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.engine import graph
from fastkv.engine.graph import GraphError, GraphStepper, Replay
from fastkv.engine.plan import plan_request
from fastkv.engine.prefill import prefill
from fastkv.engine.sampler import Sampler
from fastkv.engine.step import EagerStepper, SlotState, Stepper
from fastkv.engine.workspace import Workspace
from fastkv.errors import FaultError
from fastkv.models.llama import Llama

PROMPT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(5)).tolist()
POLICIES = [  # the last three: layers differ; heads differ; layers compete
    FullKV(),
    FastKV(min_tokens=8),
    FastKV(tsp_layer=1, tsp_len=20, kv_len=100),
    AdaKV(min_tokens=8),
    DefensiveKVLayer(min_tokens=8),
]
EACH_POLICY = pytest.mark.parametrize(
    "policy", POLICIES, ids=["full", "fastkv", "layers differ", "heads differ", "layers compete"]
)


class Recorder:
    """Stands in for the capture: counts the recordings, and replays by calling."""

    def __init__(self) -> None:
        self.recorded: list[Replay] = []
        self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Replay:
        def replay() -> None:
            self.replayed += 1
            run()

        run()  # the warm-up
        self.recorded.append(replay)
        return replay


def as_on_a_gpu(llm: LLM, patch: pytest.MonkeyPatch, record: Callable[[Callable[[], None]], Replay]) -> None:
    """Let the model decode by replays, one step ahead."""
    runtime = llm._runtime
    patch.setattr(graph, "_CudaRecorder", lambda device: record)
    patch.setattr(type(runtime), "ahead", True)
    patch.setattr(runtime, "cuda_graph", True)
    patch.setattr(runtime, "_said_slow", False)
    runtime.buffers.clear()


@pytest.fixture
def recorder(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    as_on_a_gpu(tiny_llm, monkeypatch, made)
    yield made
    tiny_llm.free_buffers()


def eager(llm: LLM, prompt: list[int], params: SamplingParams, policy: Policy) -> list[int]:
    """Token by token through `prefill` and `decode`."""
    assert params.max_tokens is not None
    sampler, slot = Sampler(1, llm.config.vocab_size, llm.device), torch.tensor([0])
    sampler.start(0, params, torch.tensor(prompt))
    pre = llm.prefill(prompt, policy, params.max_tokens)
    tokens = [sampler.sample_slots(pre.logits, slot)]
    while len(tokens) < params.max_tokens:
        tokens.append(sampler.sample_slots(llm.decode(pre.cache, tokens[-1]), slot))
    return [int(token) for token in tokens]


def stepper_of(llm: LLM) -> GraphStepper:
    idle = llm._runtime.buffers._idle
    assert idle is not None
    assert isinstance(idle.stepper, GraphStepper)
    return idle.stepper


CHOICES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 1.2, "seed": 4, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"repetition_penalty": 2.0},
]


def test_heads_of_other_lengths_leave_nothing_to_the_next_sequence(tiny_llm: LLM, recorder: Recorder) -> None:
    """The same slots and spans, for heads that differ and for heads that do not."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    policies = [FullKV(), SnapKV(kv_len=116), AdaKV(kv_len=52), SnapKV(kv_len=116)]
    found = [tiny_llm.generate(PROMPT, params, policy).token_ids for policy in policies]
    assert found == [eager(tiny_llm, PROMPT, params, policy) for policy in policies]


@EACH_POLICY
def test_a_sequence_beside_a_longer_one_reads_nothing_of_earlier_ones(
    tiny_llm: LLM, recorder: Recorder, policy: Policy
) -> None:
    """A step reads as many entries of every slot as the longest one has. What overflowed before would be NaN there."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    alone = [eager(tiny_llm, prompt, params, policy) for prompt in (PROMPT[:40], PROMPT)]
    pool = let_overflow(tiny_llm, [PROMPT, PROMPT], policy)
    outs = tiny_llm.generate([PROMPT[:40], PROMPT], params, policy)
    assert [out.token_ids for out in outs] == alone
    assert idle_pool(tiny_llm) is pool


# Every policy with the choice that has all settings; every choice with the first policy.
@pytest.mark.parametrize(
    ("policy", "choice"),
    [*((policy, CHOICES[2]) for policy in POLICIES), *((POLICIES[0], CHOICES[place]) for place in (0, 1, 3))],
    ids=str,
)
def test_replayed_steps_choose_the_eager_tokens(
    tiny_llm: LLM, recorder: Recorder, policy: Policy, choice: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, **choice)
    assert tiny_llm.generate(PROMPT, params, policy).token_ids == eager(tiny_llm, PROMPT, params, policy)
    assert recorder.replayed == 19 + 19  # the layers and the choice, of every token but the first
    assert len(recorder.recorded) == 2


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_step_is_two_replays_for_all_sequences(tiny_llm: LLM, recorder: Recorder, batch: int) -> None:
    """However many there are, and however differently they choose."""
    prompts = [PROMPT[20 * index :] for index in range(batch)]
    params = [SamplingParams(max_tokens=6, ignore_eos=True, **choice) for choice in CHOICES[:batch]]
    outs = tiny_llm.generate(prompts, params, FullKV())
    assert recorder.replayed == 5 + 5
    assert len(recorder.recorded) == 2
    for prompt, each, out in zip(prompts, params, outs, strict=True):
        assert out.token_ids == eager(tiny_llm, prompt, each, FullKV())


def test_logits_of_a_replayed_step_are_the_eager_ones(tiny_llm: LLM, recorder: Recorder) -> None:
    for policy in POLICIES:
        tiny_llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), policy)  # records
        logits = stepper_of(tiny_llm)._logits
        pre = tiny_llm.prefill(PROMPT, policy, 3)
        tokens = tiny_llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), policy).token_ids
        for token in tokens[:2]:
            expected = tiny_llm.decode(pre.cache, torch.tensor([token]))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


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
    sampled = SamplingParams(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True)
    found = tiny_llm.generate(longest, sampled, policy).token_ids
    assert found == eager(tiny_llm, longest, sampled, policy)
    assert len(recorder.recorded) == 3  # another way to choose, whose warm-up chose for nobody
    tiny_llm.generate(longest, params, FullKV())
    assert len(recorder.recorded) == 5  # another size: new memory, and new recordings of both


def test_recording_leaves_no_trace_in_the_cache(tiny_llm: LLM, recorder: Recorder) -> None:
    """A warm-up runs the step for real, but for no sequence: nothing is counted, and no number is drawn."""
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    stream = tiny_llm.stream(PROMPT, params, FastKV(min_tokens=8))
    next(stream)
    assert stream._batch is not None
    cache = stream._batch._at_work[0].cache
    assert cache.lengths.tolist() == [[[30, 30]]] * 6
    sampler = stream._batch._state.sampler
    assert sampler._step.tolist() == [1]
    next(stream)  # records, and runs two steps: its own, and the one ahead
    assert sampler._step.tolist() == [3]
    assert cache.lengths.tolist() == [[[32, 32]]] * 6
    assert cache.next_position.tolist() == [302]
    assert (cache.count(0), cache.position, cache.room) == (32, 302, 6)


def test_a_step_ahead_is_neither_emitted_nor_beyond_the_room(tiny_llm: LLM, recorder: Recorder) -> None:
    """The step after a stop is under way when the stop is found; after the last token there is none."""
    tokens = eager(tiny_llm, PROMPT, SamplingParams(max_tokens=12), FullKV())
    out = tiny_llm.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True), FullKV())
    assert out.token_ids == tokens
    assert recorder.replayed == 11 + 11
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
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    """The step is then made eagerly, as if nothing had been tried."""
    recorder = Recorder()

    def fail(run: Callable[[], None]) -> Replay:
        if len(recorder.recorded) == ("layers", "choice").index(failing):
            run()  # a warm-up is over by then
            raise GraphError("operation not permitted when stream is capturing")
        return recorder(run)

    as_on_a_gpu(tiny_llm, monkeypatch, fail)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, repetition_penalty=1.5, ignore_eos=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = tiny_llm.generate(PROMPT, params, FullKV()).token_ids
            assert found == eager(tiny_llm, PROMPT, params, FullKV())
    lines = [record.getMessage() for record in caplog.records if "graphs" in record.getMessage()]
    assert lines == [
        "CUDA graphs are off, decoding is slower: operation not permitted when stream is capturing",
    ]
    tiny_llm.free_buffers()


def slots(
    llm: LLM, n_slots: int, prompts: dict[int, list[int]], max_tokens: int
) -> tuple[SlotState, dict[int, KVCache]]:
    """Prompts in these slots of a pool, with the first token of each chosen greedily."""
    config, model = llm.config, llm._model
    shape = EntryShape(config.n_kv_heads, config.head_dim, torch.float32)
    state = SlotState.of(KVPool(DenseLayer, [320] * config.n_layers, n_slots, shape, llm.device), config.vocab_size)
    caches = {}
    for slot, prompt in prompts.items():
        plan = plan_request(config, FullKV(), len(prompt), max_tokens, torch.float32, 1000)
        caches[slot] = plan.cache_in(state.pool, range(slot, slot + 1))
        ids = torch.tensor([prompt])
        state.sampler.start(slot, SamplingParams(), ids)
        state.first(slot, prefill(model, ids, plan, caches[slot], Workspace()).logits)
    return state, caches


def steppers(llm: LLM, state: SlotState) -> list[Stepper]:
    return [EagerStepper(llm._model, state), GraphStepper(llm._model, state, Recorder())]


@pytest.mark.parametrize("kind", ["eager", "replayed"])
def test_a_step_checks_the_room_before_anything_runs(tiny_llm: LLM, kind: str) -> None:
    state, caches = slots(tiny_llm, 1, {0: PROMPT}, max_tokens=1)
    stepper = steppers(tiny_llm, state)[kind == "replayed"]
    stepper.step(caches)
    before = state.pool.lengths.clone(), state.tokens.clone()
    with pytest.raises(FastKVError, match="room for 0 more tokens"):
        stepper.step(caches)
    assert torch.equal(state.pool.lengths, before[0])
    assert torch.equal(state.tokens, before[1])
    assert int(state.pool.next_position) == caches[0].position == 301


@pytest.mark.parametrize("kind", ["eager", "replayed"])
def test_a_step_leaves_the_other_slots_alone(tiny_llm: LLM, kind: str) -> None:
    """Slot 1 is at work but not in this step, slot 3 is free: both may compute along, and nothing comes of it."""
    prompts = {0: PROMPT[:100], 1: PROMPT, 2: PROMPT[50:200]}
    state, caches = slots(tiny_llm, 5, prompts, max_tokens=8)
    stepper = steppers(tiny_llm, state)[kind == "replayed"]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = {slot: eager(tiny_llm, prompt, params, FullKV()) for slot, prompt in prompts.items()}
    assert {slot: int(state.tokens[slot]) for slot in prompts} == {slot: ids[0] for slot, ids in expected.items()}
    for step in range(1, 4):
        stepper.step({slot: caches[slot] for slot in (0, 2)})
        assert [int(state.tokens[slot]) for slot in range(3)] == [expected[0][step], expected[1][0], expected[2][step]]
        assert state.pool.lengths[0, :, 0].tolist() == [100 + step, 300, 150 + step, 0, 0]
        assert state.pool.next_position.tolist() == [100 + step, 300, 150 + step, 0, 0]
        assert [cache.position for cache in caches.values()] == [100 + step, 300, 150 + step]
    stepper.step({1: caches[1]})
    assert int(state.tokens[1]) == expected[1][1]
    stepper.step(caches)  # all of them
    assert [int(state.tokens[slot]) for slot in range(3)] == [expected[0][4], expected[1][2], expected[2][4]]
    state.pool.release(range(1, 2))
    for layer in state.pool.layers:
        assert (layer.padded(range(1, 2), 320)[0] == 0).all()


@pytest.mark.parametrize("kind", ["eager", "eager, one step ahead", "replayed"])
# The call of the head: of the prefill, of a step.
@pytest.mark.parametrize(("at", "value"), [(0, torch.nan), (1, torch.inf), (3, torch.nan)])
def test_logits_that_are_not_finite_are_a_fault(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: str, at: int, value: float
) -> None:
    """Told with the dtype, whichever way it runs, though a step may be under way; the next request is served."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = tiny_llm.generate(PROMPT[:60], params, FullKV()).token_ids
    if kind != "eager":
        as_on_a_gpu(tiny_llm, monkeypatch, Recorder())
        monkeypatch.setattr(tiny_llm._runtime, "cuda_graph", kind == "replayed")
    calls, head = 0, Llama.head

    def broken(self: Llama, hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        logits = head(self, hidden)
        return logits.index_fill(-1, torch.tensor([7]), value) if calls > at else logits

    with monkeypatch.context() as patched:
        patched.setattr(Llama, "head", broken)
        with pytest.raises(FaultError, match="NaN or infinite in float32") as told:
            tiny_llm.generate(PROMPT[:60], params, FullKV())
    assert told.value.setting == "dtype"
    assert tiny_llm.generate(PROMPT[:60], params, FullKV()).token_ids == expected
    tiny_llm.free_buffers()


def test_a_table_that_has_moved_is_recorded_anew(tiny_llm: LLM, recorder: Recorder) -> None:
    """A graph holds the address of the rotary table; a longer prompt makes it grow, and the old one is gone."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    tiny_llm.generate(PROMPT, params, FullKV())
    assert len(recorder.recorded) == 2
    tiny_llm._model.reserve(tiny_llm._model.rotary.reserved + 1)
    tiny_llm.generate(PROMPT, params, FullKV())
    assert len(recorder.recorded) == 3  # the layers; the choice reads no table


def test_a_slot_that_is_done_has_nothing_to_attend_to(tiny_llm: LLM, recorder: Recorder) -> None:
    """It computes along with the others, over lengths that may be beyond what their graph looks at."""
    prompts, lengths = [PROMPT, PROMPT[:40]], [2, 12]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in lengths]
    each = tiny_llm.generate_each(prompts, params, FullKV())
    assert next(each)[0] == 0
    pool = each._each.gi_frame.f_locals["batch"]._state.pool  # type: ignore[attr-defined]
    assert pool.lengths[:, 0].tolist() == [[0, 0]] * 6
    assert (pool.lengths[0, 1] > 0).all()
    index, output = next(each)
    assert (index, output.token_ids) == (1, eager(tiny_llm, PROMPT[:40], params[1], FullKV()))


def test_a_prefill_that_fails_leaves_no_sequence_behind(
    tiny_llm: LLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots go back to the pool: a sequence that stayed there would widen every later step."""

    def fail(*arguments: Any) -> None:
        raise FastKVError("no memory")

    params = SamplingParams(max_tokens=2, temperature=1.0, repetition_penalty=2.0)
    with monkeypatch.context() as patched:
        patched.setattr("fastkv.engine.decode_batch.prefill", fail)
        with pytest.raises(FastKVError, match="no memory"):
            tiny_llm.generate([PROMPT, PROMPT], params, FullKV())
    pool = idle_pool(tiny_llm)
    assert not any(stepper_of(tiny_llm)._state.sampler.features)
    assert [pool.take(), pool.take()] == [0, 1]


def test_what_a_graph_reads_lives_as_long_as_the_graph(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture forgets the function and keeps addresses: places that only it had held were freed."""
    alive: list[weakref.ref[object]] = []
    kind, _ = graph.graph_attention(slots(tiny_llm, 1, {}, 4)[0].pool, 4)

    def watched(*arguments: Any) -> Any:
        attention = kind(*arguments)
        alive.append(weakref.ref(attention))
        return attention

    monkeypatch.setattr(graph, "graph_attention", lambda pool, n_heads: (watched, None))
    state, caches = slots(tiny_llm, 1, {0: PROMPT}, 4)
    stepper = GraphStepper(tiny_llm._model, state, lambda run: lambda: None)
    stepper.step(caches)
    gc.collect()
    assert alive[-1]() is not None
