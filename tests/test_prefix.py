"""Prompts of a list that begin alike: the beginning is read once, and each answer is that of the prompt alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fastkv import (
    LLM,
    AdaKV,
    DefensiveKVLayer,
    FastKV,
    FastKVError,
    FullKV,
    GemFilter,
    KVzip,
    Policy,
    SamplingParams,
    SnapKV,
)
from fastkv.engine import decode_batch, graph, prefix
from fastkv.engine.prefix import Group, common_beginnings
from fastkv.engine.prefix_store import PrefixStore

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
DROPPING = [FastKV(min_tokens=8), SnapKV(kv_len=30), AdaKV(kv_len=30), DefensiveKVLayer(kv_len=30)]


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


A, B = ids(130, 1), ids(90, 2)
# Two groups, interleaved; one prompt is all of a beginning, two are equal, one has nothing in common.
RAGGED = [A + ids(9), B + ids(40), A, ids(70, 3), A + ids(1, 4), B + ids(5, 5), A + ids(200, 6), A + ids(9), B[:64]]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefill has read."""
    lengths: list[int] = []
    real = decode_batch.prefill

    def noted(model: Any, prompt: Any, *rest: Any) -> Any:
        lengths.append(prompt.shape[1])
        return real(model, prompt, *rest)

    monkeypatch.setattr(decode_batch, "prefill", noted)
    return lengths


# --- exact: nothing is dropped ---


@pytest.mark.parametrize(
    ("batch_size", "sampled"), [(1, {}), (3, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}), (20, {})]
)
def test_answers_are_those_of_the_prompts_alone(
    tiny_llm: LLM, read: list[int], batch_size: int, sampled: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, **sampled)
    alone = [tiny_llm.generate(prompt, params, FullKV()) for prompt in RAGGED]
    read.clear()
    together = tiny_llm.generate(RAGGED, params, FullKV(), batch_size=batch_size)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    # "A" keeps a token of its own, and so do the prompts that are equal; B[:64] shares too little to count
    assert sorted(read) == sorted([129, 10, 1, 2, 201, 10, 90, 40, 5, 70, 64])
    for prompt, one, other in zip(RAGGED, together, alone, strict=True):
        assert one.metrics.prompt_tokens == len(prompt)
        for name in ("kv_entries", "kv_full_entries", "kv_bytes", "kv_full_bytes", "layer_tokens", "attention_kept"):
            assert getattr(one.metrics, name) == getattr(other.metrics, name), name
        assert one.run == other.run
    assert [each.metrics.reused_tokens for each in together] == [0, 0, 129, 0, 129, 90, 129, 129, 0]
    assert tiny_llm.generate(RAGGED[:3], params, FullKV(), reuse_prefix=False)[2].metrics.reused_tokens == 0


@pytest.mark.parametrize("policy", [FullKV(), AdaKV(kv_len=30)], ids=["full", "heads differ"])
def test_replayed_steps_see_what_was_shared(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """As on a GPU, but that a replay calls what was to be captured."""
    prompts, params = [A + ids(9), A + ids(30, 4), A + ids(1, 5)], SamplingParams(max_tokens=8, ignore_eos=True)
    eager = tiny_llm.generate(prompts, params, policy, reuse_prefix=True)
    monkeypatch.setattr(graph, "_CudaRecorder", lambda device: lambda run: [run(), run][1])
    monkeypatch.setattr(type(tiny_llm._runtime), "ahead", True)
    monkeypatch.setattr(tiny_llm._runtime, "cuda_graph", True)
    tiny_llm.free_buffers()
    replayed = tiny_llm.generate(prompts, params, policy, reuse_prefix=True)
    tiny_llm.free_buffers()
    assert [each.token_ids for each in replayed] == [each.token_ids for each in eager]
    assert replayed[1].metrics.reused_tokens == 130


def test_the_bundled_model_answers_the_same(archive_llm: LLM, archive_folder: Any) -> None:
    text = (archive_folder.parent / "prompt.txt").read_text()
    start, questions = text[:1500], [" The access code of", text[1500:1600], ""]
    prompts, params = [start + each for each in questions], SamplingParams(max_tokens=8)
    together = archive_llm.generate(prompts, params, FullKV(), batch_size=2)
    assert [each.text for each in together] == [archive_llm.generate(one, params, FullKV()).text for one in prompts]
    assert min(each.metrics.reused_tokens for each in together[1:]) > 200


def test_a_policy_that_has_room_for_all_shares(tiny_llm: LLM) -> None:
    prompts = [A + ids(9), A + ids(20, 4), A + ids(300, 5)]
    policy = SnapKV(kv_len=200)
    together = tiny_llm.generate(prompts, PARAMS, policy)
    assert [each.token_ids for each in together] == [tiny_llm.generate(p, PARAMS, policy).token_ids for p in prompts]
    assert [each.metrics.reused_tokens for each in together] == [0, 130, 0]  # the last one is compressed


def test_turns_share_nothing(tiny_llm: LLM) -> None:
    sessions = [tiny_llm.session(FullKV()) for _ in range(2)]
    turns: list[Any] = [each.turn(A + ids(9)) for each in sessions]
    outputs = tiny_llm.generate([A + ids(5, 4), *turns, A + ids(6, 5)], PARAMS, FullKV())
    assert [each.metrics.reused_tokens for each in outputs] == [0, 0, 0, 130]


# --- asked for: the beginning is compressed by itself ---


@pytest.mark.parametrize("policy", DROPPING, ids=[policy.name for policy in DROPPING])
def test_a_compressed_beginning_is_a_session_that_many_ask(tiny_llm: LLM, policy: Policy) -> None:
    rests = [ids(9), ids(30, 4), ids(1, 5)]
    prompts = [A + rest for rest in rests]
    context = tiny_llm.session(policy)
    added = context.add(A)
    asked = [context.fork().generate(rest, PARAMS) for rest in rests]
    shared = tiny_llm.generate(prompts, PARAMS, policy, batch_size=3, reuse_prefix=True)
    assert [each.token_ids for each in shared] == [each.token_ids for each in asked]
    assert [each.metrics.kv_entries for each in shared] == [each.metrics.kv_entries for each in asked]
    assert [each.metrics.reused_tokens for each in shared] == [0, 130, 130]
    for rest, output in zip(rests, shared, strict=True):
        assert output.metrics.layer_tokens == tuple(count + len(rest) for count in added.layer_tokens)
        assert output.metrics.attention_kept is None
        assert output.run == asked[0].run
    plain = tiny_llm.generate(prompts, PARAMS, policy)
    assert [each.metrics.reused_tokens for each in plain] == [0] * 3


def test_a_beginning_is_repeated_in_the_words_that_ask_for_it(archive_llm: LLM) -> None:
    """As that of a session: the answers are those of what the policy keeps when it tells the model to repeat."""
    context, rests, policy = ids(300, 8), [ids(9), ids(30, 4)], KVzip(kv_retention=0.2)
    session = archive_llm.session(policy)
    session.add(context)
    asked = [session.fork().generate(rest, PARAMS).token_ids for rest in rests]
    shared = archive_llm.generate([context + rest for rest in rests], PARAMS, policy, reuse_prefix=True)
    assert [each.token_ids for each in shared] == asked


def test_what_cannot_be_asked(tiny_llm: LLM) -> None:
    with pytest.raises(FastKVError, match=r"reuse_prefix does not go with policy gemfilter, .*; leave it out"):
        tiny_llm.generate(RAGGED, PARAMS, GemFilter(), reuse_prefix=True)
    with pytest.raises(FastKVError, match="reuse_prefix must be True or False, not 1"):
        tiny_llm.generate(RAGGED, PARAMS, reuse_prefix=1)  # type: ignore[call-overload]
    with pytest.raises(FastKVError, match="reuse_prefix is for a list of prompts"):
        tiny_llm.generate(A, PARAMS, reuse_prefix=True)  # type: ignore[call-overload]


# --- one prompt after another: a store ---


@pytest.fixture
def storing(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> PrefixStore:
    """Room for 500 tokens of a full cache."""
    store = PrefixStore(500 * 2 * tiny_llm.config.n_layers * tiny_llm.config.n_kv_heads * tiny_llm.config.head_dim * 4)
    monkeypatch.setattr(tiny_llm, "_prefixes", store)
    return store


def test_a_later_prompt_goes_on_after_an_earlier_one(
    tiny_llm: LLM, storing: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [A + ids(9), A + ids(40, 4), A, A + ids(40, 4) + ids(3), B + ids(300, 5), B + ids(4), A + ids(9)]
    outputs = [tiny_llm.generate(prompt, PARAMS, FullKV()) for prompt in prompts]
    assert [each.metrics.reused_tokens for each in outputs] == [0, 130, 129, 169, 0, 90, 0]  # B + … took the room of A
    assert [each.metrics.prompt_tokens for each in outputs] == list(map(len, prompts))
    assert storing.nbytes <= storing._limit
    with monkeypatch.context() as patched:
        patched.setattr(tiny_llm, "_prefixes", None)
        assert [each.token_ids for each in outputs] == [
            tiny_llm.generate(p, PARAMS, FullKV()).token_ids for p in prompts
        ]
    tiny_llm.free_buffers()
    assert storing.nbytes == 0


def test_a_store_keeps_nothing_that_was_compressed_and_serves_no_report(tiny_llm: LLM, storing: PrefixStore) -> None:
    tiny_llm.generate(A + ids(9), PARAMS, SnapKV(kv_len=30))
    tiny_llm.session(FullKV()).generate(A + ids(9), PARAMS)
    tiny_llm.generate([A + ids(9)] * 2, PARAMS, FullKV())
    assert storing.nbytes == 0
    tiny_llm.generate(A + ids(9), PARAMS, FullKV())
    assert tiny_llm.generate(A + ids(9), PARAMS, SnapKV(kv_len=30)).metrics.reused_tokens == 0
    stream = tiny_llm.stream(A + ids(5), PARAMS, FullKV(), keep_selection=True)
    next(stream)
    assert stream.selection is not None
    assert stream.selection[0][0].shape[1] == 135


def test_a_store_remembers_what_was_read_whatever_becomes_of_it(tiny_llm: LLM, storing: PrefixStore) -> None:
    """A tensor that its owner fills with another prompt is another prompt."""
    prompt: Any = torch.tensor(A)
    tiny_llm.generate(prompt, PARAMS, FullKV())
    prompt[:] = torch.tensor(ids(130, 7))
    again = tiny_llm.generate(prompt, PARAMS, FullKV())
    assert again.metrics.reused_tokens == 0
    assert again.token_ids == tiny_llm.generate(prompt, PARAMS, FullKV(), decode_budget=1000).token_ids


def test_without_memory_nothing_is_kept_and_nothing_refused(
    tiny_llm: LLM, storing: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny_llm.generate(A + ids(9), PARAMS, FullKV()).token_ids
    monkeypatch.setattr("fastkv.engine.prefix_store.available_bytes", lambda device: 1)
    again = tiny_llm.generate(A + ids(9), PARAMS, FullKV())
    assert (again.token_ids, again.metrics.reused_tokens) == (expected, 0)
    before = storing.nbytes
    tiny_llm.generate(B + ids(9), PARAMS, FullKV())
    assert storing.nbytes == before
    with pytest.raises(FastKVError, match="prefix_cache must be a whole number of at least 0, not -1"):
        LLM("no/such/model", prefix_cache=-1)


# --- memory ---


def test_what_is_shared_is_in_the_memory_that_is_allowed(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take slots, but not more than half; with less room, each prompt is read alone, and none is refused."""
    made: list[tuple[int, int | None]] = []
    init = decode_batch.DecodeBatch.__init__

    def noted(self: Any, runtime: Any, to_come: Any, n_slots: int = 1, kv_memory: int | None = None) -> None:
        made.append((n_slots, kv_memory))
        init(self, runtime, to_come, n_slots, kv_memory)

    monkeypatch.setattr(decode_batch.DecodeBatch, "__init__", noted)
    config = tiny_llm.config
    entry = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    slot, held = 160 * entry, 160 * entry  # 130 + 9 + 4 tokens, and 130
    prompts = [A + ids(9, seed) for seed in range(5)]
    expected = [tiny_llm.generate(prompt, PARAMS, FullKV()).token_ids for prompt in prompts]
    for memory, n_slots, shares in (
        (slot, 1, False),
        (slot + held - 1, 1, False),
        (slot + held, 1, True),
        (3 * slot, 2, True),
        (9 * slot, 5, True),
    ):
        tiny_llm.free_buffers()
        outputs = tiny_llm.generate(prompts, PARAMS, FullKV(), kv_memory=memory)
        assert [each.token_ids for each in outputs] == expected
        assert (outputs[1].metrics.reused_tokens == 130) == shares
        assert made.pop() == (n_slots, memory - held if shares else memory)


def test_a_device_without_room_for_it_reads_each_alone(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, asked = [A + ids(9, seed) for seed in range(3)], []
    monkeypatch.setattr(prefix, "slots_there", lambda *arguments: asked.append(arguments[-1]) or 1)
    outputs = tiny_llm.generate(prompts, PARAMS, FullKV())
    assert [each.metrics.reused_tokens for each in outputs] == [0, 0, 0]
    assert asked == [160 * 2 * 6 * 2 * tiny_llm.config.head_dim * 4]


def test_a_beginning_is_let_go_after_its_last_prompt(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []
    real = decode_batch.DecodeBatch.admit

    def noted(self: Any, request: Any) -> Any:
        result = real(self, request)
        there.append(request.beginning.snapshot is not None)
        return result

    monkeypatch.setattr(decode_batch.DecodeBatch, "admit", noted)
    tiny_llm.generate([A + ids(9, seed) for seed in range(4)], PARAMS, FullKV(), batch_size=2)
    assert there == [True, True, True, False]


# --- which prompts begin alike ---


def best_by_trying(prompts: list[list[int]], least: int) -> int:
    """Tokens saved by the best way to put prompts into groups, of all there are."""

    def saved(group: tuple[int, ...]) -> int:
        columns = zip(*(prompts[member] for member in group), strict=False)
        length = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        length = min(length, *(len(prompts[member]) - 1 for member in group))
        return (len(group) - 1) * length if length >= least else 0

    def best(left: tuple[int, ...]) -> int:
        if len(left) < 2:
            return 0
        first, others = left[0], left[1:]
        found = best(others)
        for count in range(1, len(left)):
            for chosen in itertools.combinations(others, count):
                rest = tuple(each for each in others if each not in chosen)
                found = max(found, saved((first, *chosen)) + best(rest))
        return found

    return best(tuple(range(len(prompts))))


def test_groups_save_most() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        lengths = torch.randint(1, 8, (6,), generator=generator).tolist()
        prompts = [torch.randint(0, 2, (count,), generator=generator) for count in lengths]
        for least in (1, 3):
            groups = common_beginnings(prompts, least)
            members = [member for group in groups for member in group.members]
            assert len(set(members)) == len(members)
            for group in groups:
                assert least <= group.length < min(lengths[member] for member in group.members)
                assert len({tuple(prompts[member][: group.length].tolist()) for member in group.members}) == 1
            assert sum(group.saved for group in groups) == best_by_trying([p.tolist() for p in prompts], least)


def test_a_beginning_of_some_is_chosen_before_a_shorter_one_of_all() -> None:
    all_of, one, other = ids(70), ids(200, 1), ids(300, 2)
    prompts = [[*all_of, *document, *ids(9, seed)] for seed in range(3) for document in (one, other)]
    found = common_beginnings([torch.tensor(prompt) for prompt in prompts])
    assert sorted((sorted(group.members), group.length) for group in found) == [([0, 2, 4], 270), ([1, 3, 5], 370)]
    assert Group([0, 2, 4], 270).saved == 540
    assert common_beginnings([torch.tensor(all_of[:63] + ids(9, seed)) for seed in range(5)]) == []
