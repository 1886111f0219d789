"""Speculation changes how fast an answer comes, and none of its tokens."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import live_entries
from checkpoints import write_one_layer
from torch import Tensor

from fastkv import H2O, LLM, AdaKV, FastKV, FastKVError, FullKV, GemFilter, SamplingParams
from fastkv.cache.policies import KVzip, Quest, RocketKV
from fastkv.engine.footprint import Footprint
from fastkv.engine.speculation import asking
from fastkv.engine.speculation.drafts import SelfDraft, TextDraft
from fastkv.engine.speculation.figures import MOST_DRAFTED
from fastkv.engine.speculation.lookup import Lookup, lookup_bytes
from fastkv.engine.speculation.pace import Pace, expected_tokens
from fastkv.engine.speculation.speculative import SpeculativeBatch
from fastkv.models.weights import in_integers

PROMPT = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
GREEDY = SamplingParams(max_tokens=14, ignore_eos=True)
DRAWN = SamplingParams(
    max_tokens=14, ignore_eos=True, temperature=0.9, seed=3, repetition_penalty=1.2, top_p=0.9, min_p=0.01
)
FEW = FastKV(min_tokens=8)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", device="cpu", draft_weights="int8")


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("draft_tokens", [1, 4, None])
def test_the_tokens_are_those_of_the_full_cache(llm: LLM, params: SamplingParams, draft_tokens: int | None) -> None:
    expected = llm.generate(PROMPT, params, FullKV())
    found = llm.generate(PROMPT, params, FEW, speculation="self", draft_tokens=draft_tokens)
    assert found.token_ids == expected.token_ids
    told = found.metrics.speculation
    assert told is not None
    assert 1 + told.verifications + told.plain_steps + told.accepted_tokens == params.max_tokens
    assert draft_tokens is None or told.drafted_tokens >= told.verifications > 0


@pytest.mark.parametrize(
    "policy",
    [
        H2O(kv_len=40),
        AdaKV(kv_len=40),
        GemFilter(kv_len=40),
        KVzip(kv_len=40, chunk=64),
        FastKV(kv_len=40, tsp_len=40, lookahead=4),
        FullKV(),
    ],
    ids=lambda policy: policy.name,
)
def test_any_policy_drafts(llm: LLM, policy: Any) -> None:
    found = llm.generate(PROMPT, GREEDY, policy, speculation="self", draft_tokens=3)
    assert found.token_ids == llm.generate(PROMPT, GREEDY, FullKV()).token_ids
    assert found.run.policy == policy.name
    assert found.metrics.kv_entries == found.metrics.kv_full_entries
    assert set(found.metrics.layer_tokens) == {len(PROMPT)}  # nothing is lost on the way


@pytest.mark.parametrize("by", ["layer", "head"])
def test_scores_say_how_many_entries_a_draft_has(llm: LLM, by: str) -> None:
    policy = FastKV(keep_mass=0.5, keep_mass_by=by, min_tokens=20)
    stream = llm.stream(PROMPT, GREEDY, policy, speculation="self", draft_tokens=2)
    tokens = [piece.token_id for piece in itertools.islice(stream, 5)]
    kept = stream._batch._draft.cache.layer_entries
    assert all(2 * 20 <= count < 2 * 180 for count in kept), kept
    tokens += [piece.token_id for piece in stream]
    assert tokens == llm.generate(PROMPT, GREEDY, FullKV()).token_ids


@pytest.mark.parametrize("policy", [FEW, AdaKV(kv_len=40), FullKV()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_text_drafts_over_any_cache(llm: LLM, policy: Any, params: SamplingParams) -> None:
    """A prompt that repeats itself, so that there is something to find."""
    prompt = PROMPT[:40] * 4
    expected = llm.generate(prompt, params, policy)
    found = llm.generate(prompt, params, policy, speculation="ngram", draft_tokens=4)
    assert found.token_ids == expected.token_ids
    assert found.metrics.speculation.drafted_tokens > 0
    assert found.metrics.kv_bytes == expected.metrics.kv_bytes


def test_a_draft_that_sees_all_is_always_right(llm: LLM, tiny_llm: LLM) -> None:
    """The same weights over the same entries: every token is accepted, drawn ones, too."""
    for params in (GREEDY, DRAWN):
        told = tiny_llm.generate(PROMPT, params, FastKV(kv_len=999), speculation="self", draft_tokens=3)
        spec = told.metrics.speculation
        assert spec.acceptance == 1
        assert spec.draft_weight_bytes == 0
        # 14 tokens: the first, three times four, and one that is left, for which nothing is drafted.
        assert (spec.verifications, spec.plain_steps) == (3, 1)
        assert spec.tokens_per_verification == 4


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_draft_that_is_always_wrong_changes_nothing(
    llm: LLM, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate(PROMPT, params, FullKV()).token_ids
    propose = SelfDraft.propose

    def wrong(draft: SelfDraft, count: int) -> list[int]:
        return [(token + 1) % 256 for token in propose(draft, count)]

    monkeypatch.setattr(SelfDraft, "propose", wrong)
    found = llm.generate(PROMPT, params, FastKV(kv_len=999), speculation="self", draft_tokens=4)
    assert found.token_ids == expected
    assert found.metrics.speculation.acceptance < 0.5


@pytest.mark.parametrize("ends", ["eos", "string", "length"])
@pytest.mark.parametrize("kind", ["self", "ngram"])
def test_an_answer_ends_within_a_draft_as_it_does_without(llm: LLM, archive_llm: LLM, ends: str, kind: str) -> None:
    tiny = llm.generate(PROMPT, GREEDY, FullKV()).token_ids
    params = {
        "eos": SamplingParams(max_tokens=14, stop_token_ids=[tiny[7]]),
        "string": SamplingParams(max_tokens=14, stop="4"),
        "length": SamplingParams(max_tokens=3),
    }[ends]
    model, prompt = (archive_llm, "The code of b is 1347. The code of b is") if ends == "string" else (llm, PROMPT)
    plain = model.generate(prompt, params, FullKV())
    policy = FastKV(kv_len=999) if kind == "self" else FullKV()
    found = model.generate(prompt, params, policy, speculation=kind, draft_tokens=6)
    assert (found.text, found.token_ids, found.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)


def test_the_cache_is_what_plain_steps_leave(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where drafts were wrong: what is forgotten leaves no trace, in the full cache and in the draft's."""
    stream = llm.stream(PROMPT, GREEDY, FEW, speculation="self", draft_tokens=3)
    tokens = [next(stream).token_id for _ in range(8)]
    batch = stream._batch
    ((_, sequence),) = batch._at_work.items()
    fed = [*tokens, *batch._ready][:-1]
    plain = llm.prefill(PROMPT, FullKV(), max_tokens=14).cache
    for token in fed:
        llm.decode(plain, torch.tensor([token]))
    assert sequence.cache.position == plain.position == batch._draft.cache.position
    kept = batch._draft.cache.count(0) - len(fed)
    for layer, head in itertools.product(range(6), range(2)):
        for mine, its in zip(
            live_entries(sequence.cache.pool, layer, 0, head), live_entries(plain.pool, layer, 0, head), strict=True
        ):
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
        for mine, its in zip(
            live_entries(batch._draft.cache.pool, layer, 0, head), live_entries(plain.pool, layer, 0, head), strict=True
        ):  # the answer's entries are the full cache's
            torch.testing.assert_close(mine[kept:], its[len(PROMPT) :], atol=1e-5, rtol=1e-5)
    stream.close()


@pytest.mark.parametrize("policy", [FEW, AdaKV(kv_len=40)], ids=["fastkv", "adakv"])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_draft_catches_up_after_plain_steps(llm: LLM, policy: Any, kv_dtype: str | None) -> None:
    """It takes over the entries of the full cache, which plain steps have made."""
    llm.kv_dtype = kv_dtype
    params = dataclasses.replace(GREEDY, max_tokens=50)
    stream = llm.stream(PROMPT, params, policy, speculation="self", draft_tokens=2)
    llm.kv_dtype = None
    next(stream)
    batch = stream._batch
    batch._pace._fixed, steps = 0, 40
    for _ in range(steps):
        next(stream)
    ((_, sequence),) = batch._at_work.items()
    assert batch._draft.cache.position == len(PROMPT)
    batch._draft.propose(2)
    assert batch._draft.cache.position == sequence.cache.position == len(PROMPT) + steps
    for layer in range(6):
        whole = sequence.cache.read(layer)[0].k[0, :, -steps:]
        for part in batch._draft.cache.read(layer):
            newest = slice(-20, None)  # which are exact in both, whatever the layout
            torch.testing.assert_close(part.k[0, :, newest], whole[part.heads][:, newest])
            torch.testing.assert_close(part.k[0, :, -steps:], whole[part.heads], atol=0.1, rtol=0.1)
    stream.close()


def test_drawn_tokens_have_the_distribution_of_the_full_cache(tiny_llm: LLM) -> None:
    """Chi-square over two tokens of four each, the second one judged after a draft over a tenth of the entries."""
    prompt, n_seeds = PROMPT[:20], 160
    params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=1.0, top_k=4)
    seen: Counter[tuple[int, int]] = Counter()
    for seed in range(n_seeds):
        one = dataclasses.replace(params, seed=seed)
        out = tiny_llm.generate(prompt, one, FastKV(kv_len=10), speculation="self", draft_tokens=1)
        seen[tuple(out.token_ids[:2])] += 1
    expected = _pairs(tiny_llm, prompt, 4)
    assert set(seen) <= set(expected)
    cells = [(seen[pair], n_seeds * p) for pair, p in expected.items() if n_seeds * p >= 5]
    rest = n_seeds - sum(count for count, _ in cells), n_seeds - sum(p for _, p in cells)
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((count - p) ** 2 / p for count, p in cells)
    assert statistic < 37.7  # 0.1 % of such samples exceed that with 15 degrees of freedom, fewer with less


def _pairs(llm: LLM, prompt: Sequence[int], k: int) -> dict[tuple[int, int], float]:
    """The probabilities of two tokens after a prompt, each of the k most probable."""
    found: dict[tuple[int, int], float] = {}
    first = llm.prefill(list(prompt), FullKV()).logits[0].topk(k)
    for token, p in zip(first.indices.tolist(), first.values.softmax(0).tolist(), strict=True):
        second = llm.prefill([*prompt, token], FullKV()).logits[0].topk(k)
        for after, q in zip(second.indices.tolist(), second.values.softmax(0).tolist(), strict=True):
            found[token, after] = p * q
    return found


def test_memory_is_that_of_both_caches(llm: LLM) -> None:
    full, few = llm.generate(PROMPT, GREEDY, FullKV()).metrics, llm.generate(PROMPT, GREEDY, FEW).metrics
    told = llm.generate(PROMPT, GREEDY, FEW, speculation="self", draft_tokens=2).metrics
    assert told.kv_bytes == full.kv_bytes
    assert told.speculation.draft_kv_bytes == few.kv_bytes
    own, shared = dict(llm._drafting.model.named_parameters()), dict(llm.model.named_parameters())
    copied = [value for name, value in own.items() if value.data_ptr() != shared[name].data_ptr()]
    found = [getattr(each, "scale", None) for each in llm._drafting.model.modules()]
    scales = {
        id(each): each for each in found if isinstance(each, Tensor)
    }  # a head that is the embedding shares its own
    held = sum(each.nbytes for each in (*copied, *scales.values()))
    assert told.speculation.draft_weight_bytes == held > sum(each.nbytes for each in copied)


def test_drafting_weights_are_those_of_a_model_in_int8(llm: LLM, tiny_folder: Path) -> None:
    own = LLM(tiny_folder, dtype="float32", device="cpu", weights="int8").model
    copy = in_integers(llm.model, "int8")
    for (name, mine), (_, its) in zip(copy.named_parameters(), own.named_parameters(), strict=True):
        assert torch.equal(mine, its), name
    assert copy.rotary is llm.model.rotary
    assert in_integers(own, "int8") is own


@pytest.mark.parametrize(
    ("arguments", "setting", "says"),
    [
        ({"speculation": "other"}, "speculation", "self"),
        ({"speculation": "self", "draft_tokens": 0}, "draft_tokens", "1"),
        ({"speculation": "self", "draft_tokens": 17}, "draft_tokens", "16"),
        ({"draft_tokens": 2}, "draft_tokens", "speculation"),
        ({"speculation": "self", "decode_budget": 32}, "speculation", "decode_budget"),
        ({"speculation": "self", "keep_selection": True}, "speculation", "keep_selection"),
    ],
)
def test_what_does_not_go_together(llm: LLM, arguments: dict[str, Any], setting: str, says: str) -> None:
    with pytest.raises(FastKVError, match=says) as caught:
        llm.stream(PROMPT, GREEDY, FEW, **arguments)
    assert caught.value.setting == setting


@pytest.mark.parametrize("policy", [Quest(read_len=32, min_tokens=8), RocketKV(read_len=32, min_tokens=8)])
def test_steps_that_choose_what_they_read_are_not_judged_together(llm: LLM, policy: Any) -> None:
    """One that judges several tokens would read everything."""
    with pytest.raises(FastKVError, match=f"policy {policy.name}"):
        llm.generate(PROMPT, GREEDY, policy, speculation="ngram")
    assert llm.generate(PROMPT, GREEDY, policy, speculation="self").token_ids  # it may draft


def test_a_draft_s_index_is_counted_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens are judged at once, but they are one sequence's."""
    seen: list[Footprint] = []
    monkeypatch.setattr(asking, "check_request_fits", lambda model, plan, needed, reusable: seen.append(needed))
    for policy in (FastKV(kv_len=32), Quest(read_len=32, min_tokens=8)):
        llm.generate(PROMPT, GREEDY, policy, speculation="self")
    few, quest = seen
    assert quest.lists <= few.lists
    assert few.step >= (MOST_DRAFTED + 1) * 4 * llm.config.vocab_size


def test_what_a_draft_left_idle_is_not_asked_for_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reusable: list[int] = []
    llm.free_buffers()
    monkeypatch.setattr(asking, "check_request_fits", lambda model, plan, needed, idle: reusable.append(idle))
    found = [llm.generate(PROMPT, GREEDY, FEW, speculation="self") for _ in range(2)]
    told = found[0].metrics
    assert reusable[1] - reusable[0] >= told.kv_bytes + told.speculation.draft_kv_bytes


def test_where_nobody_asked_for_a_number_drafts_set_the_end(tmp_path: Path) -> None:
    """Within a window drafts drop tokens; the answer ends before that, as that of the policy alone does."""
    write_one_layer(tmp_path, 512, 64)
    llm = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    unset = SamplingParams(max_tokens=None, ignore_eos=True)
    alone = llm.generate(PROMPT[:40], unset, FEW)
    found = llm.generate(PROMPT[:40], unset, FEW, speculation="self")
    assert len(found.token_ids) == len(alone.token_ids) == 24
    with pytest.raises(FastKVError, match="at most 24"):
        llm.generate(PROMPT[:40], SamplingParams(max_tokens=30), FEW, speculation="self")


def test_lists_turns_and_the_model_itself_as_draft_are_refused(llm: LLM, tiny_llm: LLM) -> None:
    with pytest.raises(FastKVError, match="one prompt at a time"):
        llm.generate([PROMPT, PROMPT], GREEDY, FEW, speculation="self")
    with pytest.raises(FastKVError, match="turn of a session"):
        llm.generate(llm.session().turn(PROMPT), GREEDY, speculation="ngram")
    with pytest.raises(FastKVError, match="draft_weights"):
        tiny_llm.generate(PROMPT, GREEDY, FullKV(), speculation="self")
    with pytest.raises(FastKVError, match="int8"):
        LLM("llama-100m", load_format="dummy", device="cpu", draft_weights="int2")


# --- what drafts from the text ---


def test_what_followed_the_last_tokens_is_found() -> None:
    text = Lookup([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3])
    assert text.after(3) == [7, 8, 2]  # the latest place of (2, 3)
    text.add([4])
    assert text.after(2) == [9, 2]  # (2, 3, 4) stands further ahead, and is longer than (4,)
    text.add([5])
    assert text.after(4) == []  # 5 is new


def test_a_repetition_goes_on() -> None:
    assert Lookup([1, 2, 1, 2]).after(5) == [1, 2, 1, 2, 1]
    assert Lookup([7, 7]).after(3) == [7, 7, 7]
    assert Lookup([7]).after(3) == []


def test_any_token_may_stand_in_a_text() -> None:
    """Also where a token's number is half of a surrogate pair, or larger than any character's."""
    for token in (0, 10, 0xD800, 0x10FFFF):
        assert Lookup([token, 7, token]).after(3) == [7, token, 7]
    found = Lookup([1_200_000, 7, 1_200_000]).after(2)
    assert found[0] == 7
    assert max(found) < 1_200_000


def slow_lookup(ids: Sequence[int], count: int) -> list[int]:
    """As its definition has it."""
    for length in (3, 2, 1):
        places = [at for at in range(length, len(ids)) if ids[at - length : at] == ids[-length:]]
        if length <= len(ids) and places:
            text = list(ids)
            for at in range(places[-1], places[-1] + count):
                text.append(text[at])
            return text[len(ids) :]
    return []


def test_a_lookup_finds_what_a_slow_one_does() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        size, kinds = 1 + seed % 40, (2, 3, 9, 70_000)[seed % 4]
        ids = torch.randint(0, kinds, (size,), generator=generator).tolist()
        text = Lookup(ids[: size // 2])
        text.add(ids[size // 2 :])
        assert text.after(6) == slow_lookup(ids, 6)


@pytest.mark.parametrize("largest", [250, 60_000, 150_000])
def test_what_a_lookup_holds_is_what_is_said(largest: int) -> None:
    """Of a long text; numbers of Python's are there for a part of it at a time."""
    ids = torch.randint(largest // 2, largest, (1, 50_000), generator=torch.Generator().manual_seed(0))
    made = SimpleNamespace(_known_draft=None, _request=SimpleNamespace(all_ids=ids))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    draft = SpeculativeBatch._draft.fget(made)
    draft.add([5, 6], None)
    draft.propose(4)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak <= lookup_bytes(ids.shape[1]) + 2**18
    assert largest < 2**16 or peak > 0.8 * lookup_bytes(ids.shape[1])


def test_a_text_that_drafts_is_counted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Footprint] = []
    monkeypatch.setattr(asking, "check_request_fits", lambda model, plan, needed, reusable: seen.append(needed))
    for kind in ("ngram", "self"):
        llm.generate(PROMPT, GREEDY, FastKV(kv_len=999, tsp_rate=1), speculation=kind)
    text, model = seen
    assert text.lists - model.lists == lookup_bytes(len(PROMPT) + GREEDY.max_tokens) > 0


def test_a_text_draft_knows_the_answer_too() -> None:
    draft = TextDraft([1, 2, 3])
    draft.add([8, 2], None)
    assert draft.propose(2) == [3, 8]


# --- how many are drafted ---


def rounds(pace: Pace, chance: float, draft: float, verify: float, n: int) -> list[int]:
    """What `pace` asks for, where so large a part of every draft is right; a plain step takes a second."""
    asked = []
    for _ in range(n):
        count = pace.next()
        asked.append(count)
        if count:
            pace.judged(count, int(chance * count), count * draft, verify)
        else:
            pace.stepped(1.0)
    return asked


def test_expected_tokens() -> None:
    assert expected_tokens(0.5, 2) == 1.75
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1


def test_cheap_drafts_that_are_right_become_long() -> None:
    asked = rounds(Pace(), 1.0, draft=0.1, verify=1.2, n=30)
    assert asked[:3] == [0, 0, 3]
    assert asked[-1] == 8


@pytest.mark.parametrize(("draft", "verify"), [(0.5, 1.5), (5.0, 3.0)])
def test_drafts_that_do_not_pay_are_left_out_more_and_more(draft: float, verify: float) -> None:
    asked = rounds(Pace(), 0.0, draft, verify, n=2000)
    tried = [place for place, count in enumerate(asked) if count]
    pauses = [after - before - 1 for before, after in itertools.pairwise(tried)]
    assert min(pauses) >= 16
    later = pauses[1:]  # the first round drafts more than those that follow, and may have cost more
    assert later == sorted(later)
    assert later[-1] > later[0]
    # All in all it costs little: a round takes as long as a verification and its drafts.
    seconds = sum(count * draft + verify if count else 1.0 for count in asked)
    assert seconds < 2000 / 0.96


def test_drafts_that_cost_as_much_as_the_answer_do_not_pay() -> None:
    assert not any(rounds(Pace(), 1.0, draft=1.0, verify=1.3, n=60)[4:18])


def test_a_slow_first_verification_is_no_measure() -> None:
    """Kernels are chosen in it."""
    pace = Pace()
    for _ in range(2):
        pace.stepped(1.0)
    pace.judged(1, 1, 0.1, 20.0)
    while not pace.next():
        pace.stepped(1.0)
    pace.judged(1, 1, 0.1, 1.2)
    assert pace.gain(1) > 1.3


def test_a_fixed_number_asks_no_clock() -> None:
    assert rounds(Pace(fixed=5), 0.0, draft=9.0, verify=9.0, n=4) == [5, 5, 5, 5]
