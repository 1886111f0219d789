"""KVzip: the model repeats the prompt, the scores are what it attends to meanwhile, and nothing is left of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from caches import live_entries
from torch import Tensor

from fastkv import LLM, FastKVError, FullKV, KVzip, SamplingParams
from fastkv.cache.policies.kvzip import FIRST, LATER
from fastkv.cache.policy import Observation, Probe
from fastkv.cache.selection import select_each
from fastkv.engine.plan import RequestPlan, plan_request, position_limit
from fastkv.engine.probe import NAMED, ProbePlan, plan_probe

N_TOKENS, BUDGET, SINKS, CHUNK = 150, 30, 4, 60  # three chunks of 50
IDS = torch.randint(3, 256, (2, N_TOKENS), generator=torch.Generator().manual_seed(13))
WORDS = {FIRST: [7, 8, 9, 10, 11], LATER: [20, 21, 22], "": []}
POLICY = KVzip(kv_len=BUDGET, chunk=CHUNK)


@pytest.fixture
def llm(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The tiny model with words for an instruction, which has no tokenizer."""
    monkeypatch.setattr(tiny_llm, "_told", WORDS.__getitem__)
    return tiny_llm


@dataclass(frozen=True, kw_only=True)
class Watched(KVzip):
    """Keeps what the probes have shown of each layer."""

    name: ClassVar[str] = "watched"
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def score(self, observed: Observation) -> Tensor:
        assert observed.probed is not None
        self.seen.append(observed.probed)
        return super().score(observed)


def plan_of(llm: LLM, n_tokens: int, policy: KVzip, max_tokens: int = 0) -> RequestPlan:
    limit = position_limit(llm.config, policy, n_tokens)
    return plan_request(llm.config, policy, n_tokens, max_tokens, llm.dtype, limit, encode=WORDS.__getitem__)


def of_heads(positions: Sequence[Tensor]) -> list[list[list[int]]]:
    """Positions of each head of the first sequence, layer by layer."""
    return [[[place for place in head if place >= 0] for head in layer[0].tolist()] for layer in positions]


@torch.inference_mode()
def queries_and_keys(llm: LLM, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q [Hq, T, D] and k [Hkv, T, D] of each layer of one sequence, int64 [T], in plain steps."""
    model, found = llm.model, []
    hidden = model.embed(ids[None])
    rope = model.rope_of_range(0, len(ids))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append((q[0], k[0]))
        group = q.shape[1] // k.shape[1]
        logits = q @ k.repeat_interleave(group, 1).transpose(2, 3) / q.shape[-1] ** 0.5
        ahead = torch.ones(logits.shape[-2:]).triu(1).bool()
        return logits.masked_fill(ahead, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)

    for block in model.blocks:
        hidden = block.mlp(block.attention(hidden, rope, attend))
    return found


def brute_force(llm: LLM, prompt: Tensor, begin: int, end: int, instruct: bool) -> list[Tensor]:
    """By hand for one chunk: of each layer the most that is attended to its tokens, [Hkv, end - begin]."""
    words = (WORDS[FIRST] if begin == 0 else WORDS[LATER]) if instruct else []
    named = prompt[max(0, begin - NAMED) : begin]
    probe = torch.cat((torch.tensor(words, dtype=torch.int64), named, prompt[begin:end]))
    places = [*range(min(SINKS, begin)), *range(begin, end), *range(N_TOKENS, N_TOKENS + len(probe))]
    first, ahead = min(SINKS, begin), torch.ones(len(probe), len(places)).triu(1 + len(places) - len(probe)).bool()
    scores = []
    for q, k in queries_and_keys(llm, torch.cat((prompt, probe))):
        group = q.shape[0] // k.shape[0]
        logits = [q[head, N_TOKENS:] @ k[head // group, places].T / q.shape[-1] ** 0.5 for head in range(q.shape[0])]
        weights = torch.stack(logits).masked_fill(ahead, float("-inf")).softmax(-1)[..., first : first + end - begin]
        scores.append(torch.stack([of_group.amax(dim=(0, 1)) for of_group in weights.split(group)]))
    return scores


@pytest.mark.parametrize("instruct", [True, False])
def test_every_token_is_scored_once_as_by_hand(llm: LLM, instruct: bool) -> None:
    policy = Watched(kv_len=BUDGET, chunk=CHUNK, instruct=instruct)
    llm.prefill(IDS[:1], policy)
    for begin in (0, 50, 100):
        for found, by_hand in zip(policy.seen, brute_force(llm, IDS[0], begin, begin + 50, instruct), strict=True):
            torch.testing.assert_close(found[0, :, begin : begin + 50], by_hand, atol=1e-5, rtol=1e-4)
    assert all(found.shape == (1, 2, N_TOKENS) for found in policy.seen)


@pytest.mark.parametrize(("n_tokens", "chunk"), [(1, 1), (7, 3), (60, 60), (61, 60), (4001, 2000), (5, 2000)])
def test_chunks_are_a_partition(n_tokens: int, chunk: int) -> None:
    plan = ProbePlan(n_tokens, chunk, SINKS, (1, 2), (3,))
    bounds = list(plan.chunks())
    assert [place for begin, end in bounds for place in range(begin, end)] == list(range(n_tokens))
    prompt = torch.arange(n_tokens).expand(2, -1)
    probes = [plan.ids(prompt, begin, end) for begin, end in bounds]
    assert max(probe.shape[1] for probe in probes) == plan.longest
    assert max(end - begin for begin, end in bounds) <= chunk
    assert probes[0][1].tolist() == [1, 2, *range(bounds[0][1])]
    for (begin, end), probe in zip(bounds[1:], probes[1:], strict=True):
        assert probe[0].tolist() == [3, *range(max(0, begin - NAMED), end)]


def test_the_best_of_the_whole_model_win(llm: LLM) -> None:
    policy = Watched(kv_len=BUDGET, chunk=CHUNK)
    kept = of_heads(llm.prefill(IDS[:1], policy).kept)
    size = range(llm.config.n_layers), range(llm.config.n_kv_heads)
    certain = {(layer, head, at) for layer in size[0] for head in size[1] for at in (*range(SINKS), N_TOKENS - 1)}
    scored = [
        (float(policy.seen[layer][0, head, at]), layer, head, at)
        for layer in size[0]
        for head in size[1]
        for at in range(N_TOKENS)
        if (layer, head, at) not in certain
    ]
    best = sorted(scored, reverse=True)[: len(size[0]) * len(size[1]) * BUDGET - len(certain)]
    found = {(layer, head, at) for layer in size[0] for head in size[1] for at in kept[layer][head]}
    assert found == certain | {(layer, head, at) for _, layer, head, at in best}
    assert len({sum(map(len, layer)) for layer in kept}) > 1, "all layers have won the same"


def test_the_heads_of_a_layer_can_have_its_budget_for_themselves(llm: LLM) -> None:
    kept = of_heads(llm.prefill(IDS[:1], dataclasses.replace(POLICY, budgets="heads")).kept)
    assert {sum(map(len, layer)) for layer in kept} == {BUDGET * llm.config.n_kv_heads}
    assert len({len(head) for layer in kept for head in layer}) > 1


@pytest.mark.parametrize("budgets", ["even", "heads", "model"])
def test_equal_scores_keep_the_exact_number(budgets: str) -> None:
    policy = KVzip(kv_len=BUDGET, budgets=budgets)
    scores = [torch.full((2, 3, N_TOKENS - 1), 0.5) for _ in range(4)]
    budgets = policy.model_budgets([BUDGET] * 4, scores)
    kept = [select_each(*of_layer, policy.window) for of_layer in zip(scores, budgets, strict=True)]
    for row in range(2):
        assert sum(int(layer[row].counts.sum()) for layer in kept) == sum(layer[row].index.shape[1] for layer in kept)
        assert sum(layer[row].index.shape[1] for layer in kept) == 4 * 3 * BUDGET


def test_nothing_is_left_of_the_probe(llm: LLM) -> None:
    """Logits, and entries to the last bit, are those of a prefill that repeats nothing; so is what comes next."""
    full, pre = llm.prefill(IDS[:1], FullKV(), 3), llm.prefill(IDS[:1], POLICY, 3)
    assert torch.equal(pre.logits, full.logits)
    assert (pre.cache.position, pre.cache.room) == (N_TOKENS, 3)
    for layer, heads in enumerate(of_heads(pre.kept)):
        for head, positions in enumerate(heads):
            whole, found = (live_entries(one.cache.pool, layer, 0, head) for one in (full, pre))
            assert all(torch.equal(a[positions], b) for a, b in zip(whole, found, strict=True))
    llm.decode(pre.cache, IDS[1:, :3])
    assert pre.cache.position == N_TOKENS + 3


def test_it_is_the_same_again_and_for_each_of_a_batch(llm: LLM) -> None:
    both, again = (llm.prefill(IDS, POLICY, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(both.kept, again.kept, strict=True))
    for row in range(2):
        alone = llm.prefill(IDS[row : row + 1], POLICY, 2)
        assert of_heads([layer[row : row + 1] for layer in both.kept]) == of_heads(alone.kept)
    prompts, params = [row.tolist() for row in IDS], SamplingParams(max_tokens=5, ignore_eos=True)
    together = llm.generate(prompts, params, POLICY)
    assert [out.token_ids for out in together] == [llm.generate(one, params, POLICY).token_ids for one in prompts]


@pytest.mark.parametrize("policy", [KVzip(kv_retention=1.0), KVzip(kv_len=N_TOKENS), KVzip(min_tokens=N_TOKENS)])
def test_what_drops_nothing_repeats_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: KVzip) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is dropped")

    monkeypatch.setattr("fastkv.engine.prefill.repeat_prompt", never)
    full, pre = llm.prefill(IDS, FullKV()), llm.prefill(IDS, policy)
    assert torch.equal(pre.logits, full.logits)
    assert all(torch.equal(a, b) for a, b in zip(pre.kept, full.kept, strict=True))
    assert plan_of(llm, N_TOKENS, policy).held_nbytes == 0


def test_a_sequence_that_continues_keeps_its_new_tokens_whole(llm: LLM) -> None:
    pre = llm.prefill(IDS[:1], POLICY, 0)
    more = llm.prefill(IDS[1:, :20], POLICY, 2, cache=pre.cache)
    assert all(head[-20:] == list(range(150, 170)) for layer in of_heads(more.kept) for head in layer)
    assert pre.cache.entries == 2 * llm.config.n_layers * (BUDGET + 20)


# --- positions and memory ---


def test_where_positions_end_chunks_are_shorter(llm: LLM) -> None:
    limit = llm.config.context_length
    plan = plan_of(llm, limit - 60, KVzip(kv_len=BUDGET)).probe
    assert plan is not None
    assert plan.chunk == 60 - len(WORDS[LATER]) - NAMED
    assert limit - 60 + plan.longest <= limit
    with pytest.raises(FastKVError, match=r"at least 43 positions after its .* take another policy") as caught:
        plan_of(llm, limit - 42, KVzip(kv_len=BUDGET))
    assert caught.value.setting == "prompt"
    assert "\n" not in str(caught.value)
    short = plan_probe(Probe(3, SINKS, "", ""), "kvzip", 100, 111, WORDS.__getitem__)
    assert (short.chunk, short.longest) == (3, NAMED + 3)


def test_all_of_the_models_positions_can_be_used(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkv.engine.llm.position_limit", lambda *_: N_TOKENS + 43)
    policy = Watched(kv_len=BUDGET)
    assert llm.prefill(IDS, policy, 0).cache.entries == 2 * llm.config.n_layers * BUDGET
    assert all((scores > 0).all() for scores in policy.seen)


def test_what_is_held_is_counted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plan = llm.config, plan_of(llm, N_TOKENS, POLICY)
    assert plan.probe is not None
    assert plan.probe.longest == len(WORDS[LATER]) + NAMED + 50
    one = 2 * config.n_kv_heads * config.head_dim * 4
    assert plan.held_nbytes == config.n_layers * (N_TOKENS + plan.probe.longest) * one
    assert plan.positions == N_TOKENS + plan.probe.longest
    llm.free_buffers()
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: plan.held_nbytes)
    with pytest.raises(FastKVError, match=r"until the last layer.* take another policy"):
        llm.prefill(IDS[:1], POLICY, 1)


# --- the instruction ---


def test_the_model_is_told_in_its_own_tokens(archive_llm: LLM) -> None:
    tokenizer = archive_llm.tokenizer
    assert tokenizer is not None
    for policy, first, later in ((KVzip(min_tokens=8), FIRST, LATER), (KVzip(min_tokens=8, instruct=False), "", "")):
        plan = archive_llm._request([7] * 300, SamplingParams(max_tokens=1), policy).plan.probe
        assert plan is not None
        assert [tokenizer.decode(list(ids)) for ids in (plan.first, plan.later)] == [first, later]
        assert tokenizer.bos_id not in plan.first


def test_a_model_without_a_tokenizer_is_told_nothing(tiny_llm: LLM) -> None:
    plan = tiny_llm._request([7] * 300, SamplingParams(max_tokens=1), POLICY).plan.probe
    assert plan is not None
    assert plan.first == plan.later == ()


@pytest.mark.parametrize(
    "settings",
    [{"sinks": -1}, {"chunk": 0}, {"chunk": 1.5}, {"instruct": 1}, {"budgets": "layers"}, {"kv_len": 4}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FastKVError) as caught:
        KVzip(**settings)
    assert caught.value.setting == next(iter(settings))
