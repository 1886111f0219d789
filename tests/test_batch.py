"""Many prompts at once: each one's answer is that of the prompt alone, whatever else decodes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastkv import LLM, AdaKV, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.policy import Policy
from fastkv.engine import graph
from fastkv.engine.decode_batch import DecodeBatch
from fastkv.engine.footprint import footprint
from fastkv.engine.graph import Replay
from fastkv.engine.step import Caches, EagerStepper

GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 256, (n,), generator=GENERATOR).tolist() for n in (300, 40, 170, 512, 8, 233, 90, 301, 77)]
CHOICES = [
    SamplingParams(max_tokens=5, ignore_eos=True),
    SamplingParams(max_tokens=1, ignore_eos=True),
    SamplingParams(max_tokens=13, temperature=0.8, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=3, repetition_penalty=1.5, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=1.1, top_k=30, top_p=0.9, seed=6, ignore_eos=True),
    SamplingParams(max_tokens=16, ignore_eos=True),
    SamplingParams(max_tokens=2, ignore_eos=True),
    SamplingParams(max_tokens=7, temperature=0.5, min_p=0.05, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=5, ignore_eos=True),
]
POLICIES = [FullKV(), FastKV(min_tokens=8), FastKV(tsp_layer=1, tsp_len=20, kv_len=100), AdaKV(min_tokens=8)]


WAYS = ("eager", "replayed")


@pytest.fixture(params=WAYS)
def llm(request: pytest.FixtureRequest, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """Both ways to decode; the second as on a GPU, but that a replay calls what was to be captured."""
    if request.param == "replayed":

        def record(run: Callable[[], None]) -> Replay:
            run()  # the warm-up
            return run

        monkeypatch.setattr(graph, "_CudaRecorder", lambda device: record)
        monkeypatch.setattr(type(tiny_llm._runtime), "ahead", True)
        monkeypatch.setattr(tiny_llm._runtime, "cuda_graph", True)
    tiny_llm.free_buffers()
    yield tiny_llm
    tiny_llm.free_buffers()


@pytest.fixture(scope="module")
def alone(tiny_llm: LLM) -> dict[Policy, list[list[int]]]:
    """The tokens of each prompt alone, by plain steps: found once for all ways and batch sizes."""
    pairs = list(zip(PROMPTS, CHOICES, strict=True))
    return {
        policy: [tiny_llm.generate(prompt, params, policy).token_ids for prompt, params in pairs] for policy in POLICIES
    }


# Every two of way, batch size and policy meet; several at a time, with a slot that is filled again, all three do.
@pytest.mark.parametrize(
    ("llm", "batch_size", "policy"),
    [
        *((way, 3, policy) for way in WAYS for policy in POLICIES),
        *((WAYS[place % 2], 1, policy) for place, policy in enumerate(POLICIES)),
        *((WAYS[1 - place % 2], 20, policy) for place, policy in enumerate(POLICIES)),
    ],
    indirect=["llm"],
)
def test_each_answer_is_that_of_the_prompt_alone(
    alone: dict[Policy, list[list[int]]], llm: LLM, policy: Policy, batch_size: int
) -> None:
    together = llm.generate(PROMPTS, CHOICES, policy, batch_size=batch_size)
    assert [output.token_ids for output in together] == alone[policy]


def test_figures_of_each_request_are_its_own(llm: LLM) -> None:
    policy = FastKV(min_tokens=8)
    for prompt, params, output in zip(
        PROMPTS, CHOICES, llm.generate(PROMPTS, CHOICES, policy, batch_size=4), strict=True
    ):
        alone = llm.generate(prompt, params, policy).metrics
        figures = output.metrics
        assert (figures.prompt_tokens, figures.new_tokens) == (len(prompt), params.max_tokens)
        assert (figures.kv_bytes, figures.kv_tokens) == (alone.kv_bytes, alone.kv_tokens)
        assert output.finish_reason == "length"


def test_stop_rules_are_each_ones_own(llm: LLM) -> None:
    """An end in the middle lets the next prompt in, and emits no token of the step that was under way."""
    free = [llm.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True), FullKV()) for prompt in PROMPTS]
    ends = {output.token_ids[5] for output in free}
    expected = []
    for output in free:
        ids = output.token_ids
        first = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
        expected.append(ids[: first + 1])
    assert len({len(ids) for ids in expected}) > 2

    real = llm._request

    def with_ends(*arguments: Any) -> Any:
        request = real(*arguments)
        object.__setattr__(request, "eos_ids", frozenset(ends))
        return request

    llm._request = with_ends  # type: ignore[method-assign]
    try:
        found = llm.generate(PROMPTS, SamplingParams(max_tokens=12), FullKV(), batch_size=3)
    finally:
        del llm._request  # type: ignore[method-assign]
    assert [output.token_ids for output in found] == expected


def test_slots_are_filled_again_as_they_become_free(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step runs with a free slot while a prompt waits, and the weights are read once for all slots."""
    at_work: list[int] = []
    step = EagerStepper.step

    def count(self: EagerStepper, caches: Caches) -> None:
        at_work.append(len(caches))
        step(self, caches)

    monkeypatch.setattr(EagerStepper, "step", count)
    tiny_llm.generate(PROMPTS, SamplingParams(max_tokens=10, ignore_eos=True), FullKV(), batch_size=4)
    assert at_work == [4] * 9 + [4] * 9 + [1] * 9  # nine prompts
    at_work.clear()
    tiny_llm.generate(PROMPTS, CHOICES, FullKV(), batch_size=4)
    assert sum(at_work) == sum(params.max_tokens - 1 for params in CHOICES)  # type: ignore[operator, misc]


def test_outputs_come_as_they_are_done(tiny_llm: LLM) -> None:
    lengths = [10, 3, 6]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in lengths]
    order = [index for index, _ in tiny_llm.generate_each(PROMPTS[:3], params, FullKV())]
    assert order == [1, 2, 0]


def test_the_memory_allowed_limits_how_many_are_at_work(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = DecodeBatch.__init__

    def noted(self: DecodeBatch, runtime: Any, to_come: Any, n_slots: int, kv_memory: int | None) -> None:
        made.append(n_slots)
        init(self, runtime, to_come, n_slots, kv_memory)

    monkeypatch.setattr(DecodeBatch, "__init__", noted)
    config, params = tiny_llm.config, SamplingParams(max_tokens=8, ignore_eos=True)
    slot = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4 * 576  # 512 + 8 tokens: a bucket of 576
    for memory, n_slots in ((slot, 1), (3 * slot, 3), (4 * slot - 1, 3), (100 * slot, 5), (None, 5)):
        tiny_llm.free_buffers()
        tiny_llm.generate(PROMPTS[:5], params, FullKV(), batch_size=5, kv_memory=memory)
        assert made.pop() == n_slots
        if memory is not None:
            idle = tiny_llm._runtime.buffers._idle
            assert idle is not None
            assert idle.state is not None
            assert idle.state.pool.nbytes <= memory
    with pytest.raises(
        FastKVError, match=rf"kv_memory must be at least {slot:,} bytes \({-(-slot // 2**20)} MiB\) for the"
    ):
        tiny_llm.generate(PROMPTS, params, FullKV(), kv_memory=slot - 1)
    tiny_llm.free_buffers()
    requests = [tiny_llm._request(prompt, params, FullKV()) for prompt in PROMPTS]
    besides = max(footprint(tiny_llm.model, each.plan, 0).total for each in requests)
    monkeypatch.setattr("fastkv.engine.batch.available_bytes", lambda device: besides + 2 * slot + 5)
    tiny_llm.generate(PROMPTS, params, FullKV())
    assert made.pop() == 2


def test_memory_that_is_there_already_does_not_lift_the_limit(tiny_llm: LLM) -> None:
    """Neither a larger pool that is idle, nor one that would be made ready for both sizes."""
    config, params = tiny_llm.config, SamplingParams(max_tokens=8, ignore_eos=True)
    slot = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4 * 96  # 64 + 8 tokens: a bucket of 96
    for earlier in (FullKV(), FastKV(tsp_layer=1, tsp_len=16, kv_len=200)):
        tiny_llm.free_buffers()
        tiny_llm.generate([list(range(3, 203))] * 2, params, earlier)
        found = tiny_llm.generate([list(range(3, 67))] * 2, params, FullKV(), kv_memory=2 * slot)
        idle = tiny_llm._runtime.buffers._idle
        assert idle is not None
        assert idle.state is not None
        assert idle.state.pool.nbytes <= 2 * slot
        assert found[0].token_ids == found[1].token_ids


def test_mistakes_are_told_before_the_first_prompt_runs(tiny_llm: LLM) -> None:
    for arguments, named in (
        ({"params": [SamplingParams()] * 2}, "2 for 9 prompts"),
        ({"batch_size": 0}, "batch_size"),
        ({"kv_memory": 0}, "kv_memory"),
        ({"params": ["greedy"] * 9}, "params must be SamplingParams"),
    ):
        with pytest.raises(FastKVError, match=named):
            tiny_llm.generate_each(PROMPTS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(
        FastKVError, match="prompt 9 of the list: token id 9999 is outside the model's vocabulary"
    ) as told:
        tiny_llm.generate_each([*PROMPTS, [9999]])
    assert told.value.prompt == 9
    for no_list in ("abc", None, iter(PROMPTS)):
        with pytest.raises(FastKVError, match="prompts must be a list of prompts, not"):
            tiny_llm.generate_each(no_list)  # type: ignore[arg-type]
    for limit in ({"batch_size": 2}, {"kv_memory": 1}):
        with pytest.raises(FastKVError, match="batch_size and kv_memory are for a list of prompts"):
            tiny_llm.generate(PROMPTS[0], **limit)  # type: ignore[call-overload]
        with pytest.raises(FastKVError, match="the prompt is empty"):
            tiny_llm.generate([], **limit)  # type: ignore[call-overload]
    assert list(tiny_llm.generate_each([])) == []


def test_leaving_early_hands_the_memory_on(tiny_llm: LLM) -> None:
    tiny_llm.free_buffers()
    each = tiny_llm.generate_each(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True), FullKV(), batch_size=2)
    next(each)
    assert tiny_llm._runtime.buffers.idle_bytes == 0
    each.close()  # type: ignore[attr-defined]
    assert tiny_llm._runtime.buffers.idle_bytes > 0
