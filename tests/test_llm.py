"""The library: generate, stream, several models and policies at once, and what it refuses."""

from __future__ import annotations

import gc
import itertools
import math
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkv
from fastkv import LLM, FastKV, FastKVError, FullKV, Output, Piece, SamplingParams
from fastkv.engine.footprint import footprint
from fastkv.engine.memory import available_bytes
from fastkv.errors import FaultError
from fastkv.kernels import limits

STORY = "Once upon a time"
# The beginning of what the model's author shows for it; greedy decoding writes it word for word.
PUBLISHED = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
    "She wanted to play with it, but it was too high."
)
LONG = [3 + i * 7 % 250 for i in range(600)]


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> LLM:
    return LLM(stories_folder, device="cpu")


def test_greedy_text_is_the_published_one(stories: LLM) -> None:
    assert stories.generate(STORY).text.startswith(PUBLISHED)


def test_output(stories: LLM) -> None:
    out = stories.generate(STORY, SamplingParams(max_tokens=5))
    assert isinstance(out, Output)
    assert out.finish_reason == "length"
    assert len(out.token_ids) == out.metrics.new_tokens == 5
    assert out.metrics.prompt_tokens == 5  # BOS and four pieces
    assert out.metrics.ttft_s > 0
    assert out.metrics.decode_tokens_per_s is not None
    assert stories.generate(STORY, SamplingParams(max_tokens=1)).metrics.decode_tokens_per_s is None


def test_stream_adds_up_to_generate(stories: LLM) -> None:
    stream = stories.stream(STORY, SamplingParams(max_tokens=30))
    pieces = list(stream)
    out = stories.generate(STORY, SamplingParams(max_tokens=30))
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == out.text == stream.output().text
    assert [piece.token_id for piece in pieces] == out.token_ids


def test_a_stream_left_early_tells_what_came_so_far(stories: LLM) -> None:
    stream = stories.stream(STORY)
    first = [next(stream), next(stream)]
    out = stream.output()
    assert out.text == "".join(piece.text for piece in first)
    assert out.finish_reason == "interrupted"


def test_a_list_is_each_prompt_alone(stories: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=4)
    prompts = [STORY, "The dog", "Tom and Sue"]
    together = stories.generate(prompts, params)
    assert [out.text for out in together] == [stories.generate(one, params).text for one in prompts]
    assert len({out.text for out in together}) == 3


def test_a_list_of_token_ids_is_one_prompt_and_a_list_of_lists_several(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=3)
    one = tiny_llm.generate([5, 6, 7], params)
    several = tiny_llm.generate([[5, 6, 7], [8, 9]], params)
    assert isinstance(one, Output)
    assert several[0].token_ids == one.token_ids
    assert several[1].metrics.prompt_tokens == 2


def test_times_of_a_list_count_from_the_call(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a slot is part of the time to the first token: it is what the caller waits."""
    seconds = itertools.count()
    with monkeypatch.context() as patched:  # a clock that goes on by a second each time it is read
        patched.setattr(time, "perf_counter", lambda: float(next(seconds)))
        outs = tiny_llm.generate([LONG] * 4, SamplingParams(max_tokens=2), batch_size=1)
    times = [out.metrics.ttft_s for out in outs]
    assert times == sorted(times)
    assert 3 * times[0] / 2 < times[-1] < next(seconds)
    each = tiny_llm.generate_each([[5, 6]], SamplingParams(max_tokens=1))
    time.sleep(0.2)  # the caller is in no hurry to look
    assert next(each)[1].metrics.ttft_s >= 0.2


def test_token_ids_get_no_bos(stories: LLM) -> None:
    ids = stories.tokenizer.encode(STORY) if stories.tokenizer else []
    params = SamplingParams(max_tokens=8)
    assert ids[0] == 1
    assert stories.generate(ids, params).token_ids == stories.generate(STORY, params).token_ids
    assert stories.generate(ids[1:], params).metrics.prompt_tokens == 4


def test_same_seed_same_text(stories: LLM) -> None:
    def text(seed: int) -> str:
        return stories.generate(STORY, SamplingParams(max_tokens=20, temperature=1.0, seed=seed)).text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_eos_stays_in_the_ids_and_out_of_the_text(archive_llm: LLM, archive_folder: Path) -> None:
    prompt = (archive_folder.parent / "prompt.txt").read_text().rstrip("\n")
    out = archive_llm.generate(prompt)
    assert out.finish_reason == "stop"
    assert out.token_ids[-1] == 1
    assert "end_of_text" not in out.text
    longer = archive_llm.generate(prompt, SamplingParams(ignore_eos=True, max_tokens=12))
    assert longer.finish_reason == "length"
    assert len(longer.token_ids) == 12
    assert longer.text.startswith(out.text)
    assert "end_of_text" not in longer.text


def test_a_model_without_tokenizer_takes_ids_only(tiny_llm: LLM) -> None:
    assert tiny_llm.tokenizer is None
    out = tiny_llm.generate([5, 6, 7], SamplingParams(max_tokens=4))
    assert out.text == ""
    assert len(out.token_ids) == 4
    with pytest.raises(FastKVError, match=r"tokenizer\.json"):
        tiny_llm.generate("text")


def test_models_and_policies_share_nothing(tiny_folder: Path, archive_folder: Path) -> None:
    """Interleaved streams of two models and three policies give what each gives alone: nothing is shared."""
    tiny = LLM(tiny_folder, policy=FullKV(), dtype="float32", device="cpu")
    archive = LLM(archive_folder, policy=FastKV(kv_retention=0.3), dtype="float32", device="cpu")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    runs: list[tuple[LLM, Any]] = [(tiny, None), (archive, None), (tiny, FastKV(min_tokens=8)), (archive, FullKV())]
    alone = [llm.generate(LONG, params, policy).token_ids for llm, policy in runs]
    streams = [llm.stream(LONG, params, policy) for llm, policy in runs]
    together = [[piece.token_id for piece in pieces] for pieces in zip(*zip(*streams, strict=True), strict=True)]
    assert together == alone
    assert tiny.policy == FullKV()
    assert alone[0] != alone[2] or alone[1] != alone[3]


def test_the_policy_of_a_call_wins_for_that_call_alone(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    assert tiny_llm.generate(LONG, params, FullKV()).metrics.kv_tokens == 600
    assert tiny_llm.generate(LONG, params).metrics.kv_tokens == 128
    assert tiny_llm.policy == FastKV()


def test_default_max_tokens_is_what_the_context_leaves(tiny_llm: LLM) -> None:
    limit = tiny_llm.config.context_length
    assert tiny_llm.generate([7] * (limit - 3), SamplingParams(ignore_eos=True)).metrics.new_tokens == 3
    with pytest.raises(FastKVError, match="max_tokens must be at most 3"):
        tiny_llm.generate([7] * (limit - 3), SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ("", "empty"),
        ([1, 256], "256"),
        ([-1], "-1"),
        ([1.5], "token ids"),
        ([True], "token ids"),
        ({"a": 1}, "token ids"),
        (None, "token ids"),
        (7, "token ids"),
        ([[5], "text"], "tokenizer"),
        ([[5], []], "empty"),
        ([5] * 8193, "8193 tokens"),
        ([5] * 8192, "fills"),
        (torch.zeros(2, 3, dtype=torch.int64), "several"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_prompts_are_refused(tiny_llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(FastKVError, match=message) as caught:
        tiny_llm.generate(prompt)
    assert "\n" not in str(caught.value)


def test_mistakes_are_raised_by_stream_itself(tiny_llm: LLM) -> None:
    with pytest.raises(FastKVError):
        tiny_llm.stream([])


@pytest.mark.parametrize("wrong", ["fastkv", FastKV, 3])
def test_a_policy_must_be_one(tiny_llm: LLM, wrong: Any) -> None:
    with pytest.raises(FastKVError, match="policy must be"):
        tiny_llm.generate([5], policy=wrong)


def test_params_must_be_sampling_params(tiny_llm: LLM) -> None:
    with pytest.raises(FastKVError, match="SamplingParams"):
        tiny_llm.generate([5], {"temperature": 1})  # type: ignore[call-overload]


def test_a_tsp_layer_outside_the_model_is_refused_before_loading(tiny_folder: Path) -> None:
    with pytest.raises(FastKVError, match="tsp_layer"):
        LLM(tiny_folder, policy=FastKV(tsp_layer=6))


def test_a_stream_whose_logits_are_not_finite_is_over(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no generator, which an exception ends: what it gave after that would be the continuation of no token."""
    tiny_llm.free_buffers()
    stream = tiny_llm.stream(LONG, SamplingParams(max_tokens=9, ignore_eos=True))
    first = next(stream)
    real = tiny_llm.model.head
    with monkeypatch.context() as patched:
        patched.setattr(tiny_llm.model, "head", lambda hidden: real(hidden) * float("nan"))
        with pytest.raises(FaultError, match="NaN or infinite"):
            next(stream)
    assert list(stream) == []
    assert stream.output().token_ids == [first.token_id]
    assert tiny_llm._runtime.buffers.idle_bytes > 0, "its memory is not handed on"


def test_a_stream_left_early_lets_its_cache_go(tiny_llm: LLM) -> None:
    """A stream that referred to itself kept gigabytes until Python happened to look for cycles."""
    gc.disable()
    try:
        caches = []
        for _ in range(3):
            stream = tiny_llm.stream(LONG)
            next(stream)
            assert stream._batch is not None
            caches.append(weakref.ref(stream._batch._at_work[0].cache))
        del stream
        assert [cache() for cache in caches] == [None] * 3
    finally:
        gc.enable()


def test_a_finished_or_closed_stream_holds_no_cache(tiny_llm: LLM) -> None:
    finished = tiny_llm.stream(LONG, SamplingParams(max_tokens=2))
    list(finished)
    closed = tiny_llm.stream(LONG)
    next(closed)
    closed.close()
    for stream in (finished, closed):
        assert stream._batch is None
        assert list(stream) == []
        assert stream.output().metrics.kv_bytes > 0
    assert closed.output().finish_reason == "interrupted"


def test_the_policy_of_a_model_can_be_set_and_is_checked(tiny_folder: Path) -> None:
    """Unchecked, a TSP layer outside the model silently turned TSP off."""
    llm = LLM(tiny_folder, device="cpu")
    llm.policy = FullKV()
    assert llm.generate(LONG, SamplingParams(max_tokens=1)).metrics.kv_tokens == 600
    for wrong in (FastKV(tsp_layer=99), "full"):
        with pytest.raises(FastKVError):
            llm.policy = wrong  # type: ignore[assignment]
    assert llm.policy == FullKV()


def test_logits_can_be_written_to(tiny_llm: LLM) -> None:
    """Banning a token between two steps is what step-by-step decoding is for."""
    pre = tiny_llm.prefill([5, 6, 7])
    pre.logits[:, 3] = -torch.inf
    tiny_llm.decode(pre.cache, pre.logits.argmax(-1)).add_(1)


@pytest.mark.parametrize("wrong", [None, 123, b"folder"])
def test_a_model_must_be_named(wrong: Any) -> None:
    with pytest.raises(FastKVError, match="model must be"):
        LLM(wrong)


def test_numpy_numbers_and_arrays(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.0))
    policy = FastKV(window=np.int64(8), kv_retention=np.float32(0.5))
    expected = tiny_llm.generate([5, 6, 7], params).token_ids
    for dtype in (np.int64, np.uint16, np.uint64):
        assert tiny_llm.generate(np.array([5, 6, 7], dtype), params, policy).token_ids == expected  # type: ignore
    both = tiny_llm.generate([np.array([5, 6, 7]), np.array([8, 9])], params)  # type: ignore
    assert both[0].token_ids == expected
    assert len(both) == 2


def test_a_full_container_can_take_back_its_file_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was just downloaded fills the container with cached files; there is room all the same."""
    for name, text in (("max", "1000000"), ("current", "999000"), ("stat", "active_file 300000\ninactive_file 400000")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(limits, "MOUNT", tmp_path)
    monkeypatch.setattr(limits, "heap_free", lambda: 0)
    assert available_bytes(torch.device("cpu")) == 701_000


def test_out_of_memory_is_a_users_mistake(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: 100_000)
    tiny_llm.free_buffers()
    with pytest.raises(FastKVError, match=r"the request needs .* of KV cache"):
        tiny_llm.generate(LONG)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_generates(tiny_folder: Path, dtype: str) -> None:
    llm = LLM(tiny_folder, dtype=dtype, device="cpu")
    assert llm.dtype == getattr(torch, dtype)
    policy = FastKV(min_tokens=8, tsp_rate=1.0)  # of random weights, rounding would propagate other tokens
    pre = llm.prefill(LONG, policy)
    reference = LLM(tiny_folder, dtype="float32", device="cpu").prefill(LONG, policy)
    assert pre.cache.read(0)[0].k.dtype == llm.dtype
    assert pre.logits.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(pre.logits, reference.logits).item() > 0.99


def test_auto_dtype_is_the_checkpoints_or_float32(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkv.engine.device._cpu_computes", lambda dtype: True)
    assert LLM(tiny_folder, device="cpu").dtype == torch.bfloat16
    monkeypatch.setattr("fastkv.engine.device._cpu_computes", lambda dtype: False)
    assert LLM(tiny_folder, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "mps", ""])
def test_unknown_devices_are_refused(tiny_folder: Path, device: str) -> None:
    with pytest.raises(FastKVError, match="device must be"):
        LLM(tiny_folder, device=device)


def test_public_names() -> None:
    for name in fastkv.__all__:
        assert getattr(fastkv, name) is not None
        assert name in dir(fastkv)
    assert issubclass(FastKVError, ValueError)
    with pytest.raises(AttributeError):
        _ = fastkv.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_attention_backends_agree(tiny_llm: LLM, tiny_folder: Path, backend: str) -> None:
    other = LLM(tiny_folder, dtype="float32", device="cpu", attention=backend)
    expected = tiny_llm.prefill(LONG, FullKV()).logits
    torch.testing.assert_close(other.prefill(LONG, FullKV()).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_attention_asked_for_is_the_one_that_runs(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = torch.nn.attention.sdpa_kernel

    def watch(backend: object) -> object:
        asked.append(backend)
        return real(backend)

    llm = LLM(tiny_folder, device="cpu", attention="math")
    monkeypatch.setattr("fastkv.engine.attention.sdpa_kernel", watch)
    llm.prefill(LONG, FullKV())
    assert asked == [torch.nn.attention.SDPBackend.MATH] * 5  # the last layer has a single query


@pytest.mark.parametrize(
    ("backend", "line"), [("cudnn", "does not work here (float32 on cpu); use auto"), ("fast", "must be one of auto,")]
)
def test_an_attention_that_cannot_be_is_refused(tiny_folder: Path, backend: str, line: str) -> None:
    with pytest.raises(FastKVError) as caught:
        LLM(tiny_folder, device="cpu", dtype="float32", attention=backend)
    assert line in str(caught.value)
    assert caught.value.setting == "attention"


def test_idle_memory_counts_as_room_and_can_be_freed(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_folder, device="cpu")
    params = SamplingParams(max_tokens=2)
    llm.generate(LONG, params, FullKV())
    held = llm._runtime.buffers.idle_bytes
    assert held > 600 * 2 * 6 * 2 * 8
    request = llm._request(LONG, params, FullKV())
    needed = footprint(llm.model, request.plan, llm._slot_bytes(request))
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: needed.total - needed.cache)
    llm.generate(LONG, params, FullKV())
    llm.free_buffers()
    assert llm._runtime.buffers.idle_bytes == 0
    with pytest.raises(FastKVError, match=r"the request needs .* of KV cache"):
        llm.generate(LONG, params, FullKV())


class Odd:
    """Breaks whatever looks at it."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


ODD = [3, 2**70, 10**5000, b"cpu", torch.device("meta"), torch.tensor([1.0, 2.0]), [], {}, object(), Odd(), "x" * 10**6]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "name", ["device", "dtype", "weights", "load_format", "attention", "policy", "revision", "compile", "cuda_graph"]
)
def test_arguments_of_another_kind_end_in_our_own_error(tiny_folder: Path, name: str, value: Any) -> None:
    with pytest.raises(FastKVError):
        LLM(tiny_folder, **{"device": "cpu", name: value})


@pytest.mark.parametrize("value", [*ODD[1:], math.nan], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos"])
def test_sampling_of_another_kind_ends_in_our_own_error(name: str, value: Any) -> None:
    if (name, type(value)) == ("temperature", int) and value < 2**71:
        pytest.skip("a temperature like any other")
    with pytest.raises(FastKVError) as refused:
        SamplingParams(**{name: value})
    assert refused.value.setting == name


def test_numbers_of_numpy_are_numbers(tiny_llm: LLM) -> None:
    numpy = pytest.importorskip("numpy")
    given = {"max_tokens": numpy.int64(3), "seed": numpy.uint8(7), "temperature": numpy.float32(0.5)}
    plain = {"max_tokens": 3, "seed": 7, "temperature": 0.5}
    outputs = [tiny_llm.generate([5, 6], SamplingParams(**each, ignore_eos=True)).token_ids for each in (given, plain)]
    assert outputs[0] == outputs[1]
