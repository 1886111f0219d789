"""Look-ahead: a draft over all that the layers saw scores the prompt again, and then has never been."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkv import ASL, LLM, AdaKV, FastKV, FastKVError, PyramidKV, SamplingParams, SnapKV, StructKV
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.policy import Observation, Policy
from fastkv.cache.scores import value_norms
from fastkv.cli import main
from fastkv.engine.footprint import footprint
from fastkv.engine.plan import RequestPlan, plan_request, position_limit
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.workspace import Workspace

M = 5
ONE_PROCESS = Observation(0, *[torch.empty(0)] * 3)
TSP = FastKV(min_tokens=8, tsp_layer=1, tsp_rate=0.5, lookahead=M, lookahead_reach=3)
NO_TSP = FastKV(min_tokens=8, tsp_rate=1.0, lookahead=M)
ONE_LENGTH: list[WindowScored] = [
    TSP,
    NO_TSP,
    FastKV(min_tokens=8, tsp_layer=1, tsp_rate=0.5, kv_retention=0.6, lookahead=M),  # layers 2 to 5 keep all they see
    FastKV.paper(min_tokens=8, tsp_layer=(1, 3), tsp_rate=(0.5, 0.3), lookahead=M),
    SnapKV(min_tokens=8, pooling="avg", lookahead=M),
    PyramidKV(min_tokens=10, lookahead=M),
    ASL(min_tokens=8, lookahead=M),
    StructKV(min_tokens=8, lookahead=M),
]
POLICIES: list[WindowScored] = [*ONE_LENGTH, AdaKV(min_tokens=8, lookahead=M)]


def name_of(policy: Policy) -> str:
    return f"{policy.name}-{getattr(policy, 'tsp_rate', None)}"


def prompt(seed: int = 0, batch: int = 1, n_tokens: int = 160) -> Tensor:
    return torch.randint(3, 256, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def without(policy: WindowScored) -> WindowScored:
    return dataclasses.replace(policy, lookahead=0)


def keeping_all(policy: WindowScored) -> WindowScored:
    """Without it, and each layer keeps all that it saw."""
    return dataclasses.replace(policy, kv_retention=1.0, lookahead=0)


def plan_of(llm: LLM, n_tokens: int, policy: Policy, max_tokens: int = 6) -> RequestPlan:
    limit = position_limit(llm.config, policy, n_tokens)
    return plan_request(llm.config, policy, n_tokens, max_tokens, llm.dtype, limit)


def prefill_until(llm: LLM, ids: Tensor, policy: Policy, eos_ids: Sequence[int]) -> Prefill:
    """A prefill whose draft any of these tokens ends."""
    plan = plan_of(llm, ids.shape[1], policy)
    return prefill(llm.model, ids, plan, plan.new_cache(len(ids), llm.device), Workspace(), eos_ids=eos_ids)


def draft_of(llm: LLM, ids: Tensor, policy: WindowScored, count: int = M) -> Tensor:
    """What plain greedy decoding says where nothing but the propagation of tokens has dropped any, [B, count]."""
    pre = llm.prefill(ids, keeping_all(policy), count)
    tokens = [pre.logits.argmax(-1)]
    for _ in range(count - 1):
        tokens.append(llm.decode(pre.cache, tokens[-1]).argmax(-1))
    return torch.stack(tokens, dim=1)


def same_kept(one: Prefill, other: Prefill) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.kept, other.kept, strict=True))


# --- what is chosen ---


def slow_choice(llm: LLM, ids: Tensor, policy: WindowScored) -> list[Tensor]:
    """The positions that each layer keeps of one prompt, [Hkv, n], with attention written out once more.

    K and V come from a full forward of the tokens that each layer saw, the draft's queries from
    plain decoding over a cache that keeps all of these.
    """
    model, base = llm.model, llm.prefill(ids, keeping_all(policy), policy.lookahead)
    drafted = slow_draft(llm, base, policy.lookahead)
    kept = []
    hidden, rope = model.embed(ids), model.rope_of_range(0, ids.shape[1])
    for layer, block in enumerate(model.blocks):
        _, k, v = block.project(hidden, rope)
        before = k.shape[2] - policy.window
        ahead = attention_of(drafted[layer][0], torch.cat((k, drafted[layer][1]), dim=2))
        received = ahead.amax(dim=-2) if policy.queries == "max" else ahead.sum(dim=-2)  # [Hkv, G, T + m]
        received = received[..., :before]
        if policy.values:
            received = received * value_norms(v)[0, :, None, :before]
        count = min(policy.budget(layer, llm.config.n_layers, ids.shape[1]), k.shape[2])
        best = slow_best(policy, received, count - policy.window)
        recent = torch.arange(before, k.shape[2]).expand(len(best), -1)
        kept.append(base.tokens[layer][0][torch.cat((best.sort(dim=-1).values, recent), dim=1)])
        if layer + 1 < llm.config.n_layers:
            hidden = block.mlp(block.attention(hidden, rope, attend))
            hidden = hidden[:, torch.isin(base.tokens[layer], base.tokens[layer + 1])[0]]
            rope = model.rope(base.tokens[layer + 1])
    return kept


def slow_best(policy: WindowScored, received: Tensor, count: int) -> Tensor:
    """The best by forward pooling, then for the narrow part of the budget the best others by `kernel` neighbours."""
    reach = policy.reach if policy.lookahead_reach is None else policy.lookahead_reach
    scores = policy.smoothed(ONE_PROCESS, received[None], reach)[0]
    if not (isinstance(policy, FastKV) and policy.narrows):
        return scores.topk(count, dim=-1).indices
    n_wide = max(count - int(policy.narrow * count), min(count, 3 * (policy.reach + 1)))
    wide = scores.topk(n_wide, dim=-1).indices
    narrow = policy.smoothed(ONE_PROCESS, received[None], None)[0]
    return narrow.scatter(-1, wide, float("inf")).topk(count, dim=-1).indices


def slow_draft(llm: LLM, base: Prefill, count: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer: q and k [1, H, count, D] of the tokens that greedy decoding over a cache gives."""
    model, cache = llm.model, base.cache
    steps = []
    token = base.logits.argmax(-1)
    for _ in range(count):
        hidden, rope = model.embed(token[None]), model.rope(cache.next_position[None])
        projected = []
        for layer, block in enumerate(model.blocks):
            (part,) = cache.read(layer)
            q, k, v = block.project(hidden, rope)
            keys, values = torch.cat((part.k, k), dim=2), torch.cat((part.v, v), dim=2)
            hidden = block.mlp(block.attention(hidden, rope, lambda q, *_, k=keys, v=values: attend(q, k, v)))
            projected.append((q, k))
        steps.append(projected)
        token = llm.decode(cache, token).argmax(-1)
    layers = zip(*steps, strict=True)
    return [(torch.cat([q for q, _ in of], dim=2), torch.cat([k for _, k in of], dim=2)) for of in layers]


def attention_of(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention of the last queries, K repeated to the query heads: [Hkv, G, n, T]."""
    group, n_queries, n_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logits = q @ k.repeat_interleave(group, dim=1).transpose(2, 3) / q.shape[-1] ** 0.5
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    return logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)[0].unflatten(0, (-1, group))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_of(q, k).flatten(0, 1)[None] @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@pytest.mark.parametrize("policy", ONE_LENGTH, ids=name_of)
@torch.inference_mode()
def test_layers_keep_what_the_slow_twin_keeps(tiny_llm: LLM, policy: WindowScored) -> None:
    ids = prompt(1)
    ahead = prefill_until(tiny_llm, ids, policy, [])
    assert not same_kept(ahead, tiny_llm.prefill(ids, without(policy)))
    for layer, expected in enumerate(slow_choice(tiny_llm, ids, policy)):
        assert torch.equal(ahead.kept[layer][0], expected), layer


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_the_draft_leaves_no_trace(tiny_llm: LLM, policy: WindowScored) -> None:
    """Logits, propagated tokens, sizes and positions are the prefill's own; decoding reads just the chosen entries."""
    ids = prompt(2)
    base, ahead = tiny_llm.prefill(ids, without(policy), 4), tiny_llm.prefill(ids, policy, 4)
    assert torch.equal(ahead.logits, base.logits)
    assert all(torch.equal(*pair) for pair in zip(ahead.tokens, base.tokens, strict=True))
    one, other = ahead.cache, base.cache
    assert (one.position, one.room, one.whole_from) == (other.position, other.room, other.whole_from)
    assert not one.unfinished
    assert torch.equal(one.next_position, other.next_position)
    assert one.entries == other.entries
    if not policy.per_head:
        assert torch.equal(one.lengths, other.lengths)
    for layer in range(tiny_llm.config.n_layers):
        assert torch.equal(one.positions(layer), ahead.kept[layer])


@pytest.mark.parametrize("policy", [TSP, NO_TSP], ids=name_of)
def test_decoding_after_it_equals_that_of_a_cache_built_from_the_chosen_entries(
    tiny_llm: LLM, policy: WindowScored
) -> None:
    ids = prompt(3, batch=2)
    ahead = tiny_llm.prefill(ids, policy, 4)
    built = tiny_llm.prefill(ids, without(policy), 4)
    whole = tiny_llm.prefill(ids, keeping_all(policy), 4)
    for layer, kept in enumerate(ahead.kept):
        (part,) = whole.cache.read(layer)
        at = torch.searchsorted(whole.kept[layer].contiguous(), kept)
        built.cache.store(layer, part.k, part.v, at, kept)
    tokens = ahead.logits.argmax(-1)
    for _ in range(4):
        one, other = tiny_llm.decode(ahead.cache, tokens), tiny_llm.decode(built.cache, tokens)
        assert torch.equal(one, other)
        tokens = one.argmax(-1)


@pytest.mark.parametrize("policy", [*ONE_LENGTH[:-2], POLICIES[-1]], ids=name_of)  # ASL's rows decide together
def test_rows_of_a_batch_equal_single_runs(tiny_llm: LLM, policy: WindowScored) -> None:
    ids = prompt(4, batch=3)
    drafted = draft_of(tiny_llm, ids, policy)
    eos = [int(drafted[1, 2]), int(drafted[2, 0])]  # rows end at different steps, one before the first
    together = prefill_until(tiny_llm, ids, policy, eos)
    for row in range(3):
        alone = prefill_until(tiny_llm, ids[row : row + 1], policy, eos)
        for layer, kept in enumerate(alone.kept):
            assert torch.equal(together.kept[layer][row, :, : kept.shape[2]], kept[0]), (row, layer)


# --- where the draft ends ---


@pytest.mark.parametrize("end", [0, 2])
def test_an_end_of_text_token_ends_the_draft(tiny_llm: LLM, end: int) -> None:
    """What it drafted before is what a shorter look-ahead drafts; nothing, where it is the first token."""
    ids = prompt(5)
    drafted = draft_of(tiny_llm, ids, NO_TSP)[0].tolist()
    assert drafted[end] not in drafted[:end]
    ended = prefill_until(tiny_llm, ids, NO_TSP, [drafted[end]])
    assert same_kept(ended, prefill_until(tiny_llm, ids, dataclasses.replace(NO_TSP, lookahead=end), []))
    assert not same_kept(ended, prefill_until(tiny_llm, ids, NO_TSP, []))
    assert ended.cache.room == 6


def test_llm_ends_it_at_the_models_own_token(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(6)
    first = int(draft_of(tiny_llm, ids, NO_TSP)[0, 0])
    monkeypatch.setattr(tiny_llm, "config", dataclasses.replace(tiny_llm.config, eos_token_ids=(first,)))
    base = tiny_llm.prefill(ids, without(NO_TSP))
    assert same_kept(tiny_llm.prefill(ids, NO_TSP), base)
    prompt_ids = ids[0].tolist()
    for ignore, same in ((False, True), (True, False)):
        stream = tiny_llm.stream(
            prompt_ids, SamplingParams(max_tokens=2, ignore_eos=ignore), NO_TSP, keep_selection=True
        )
        next(stream)
        assert stream.selection is not None
        kept = stream.selection[1]
        assert all(torch.equal(*pair) for pair in zip(kept, base.kept, strict=True)) is same
        stream.close()


def test_the_models_positions_end_it(tiny_llm: LLM) -> None:
    limit = tiny_llm.config.context_length
    assert plan_of(tiny_llm, limit - 3, NO_TSP, 2).lookahead == 3
    assert plan_of(tiny_llm, limit - 3, NO_TSP, 2).positions == limit
    assert plan_of(tiny_llm, limit, NO_TSP, 0).lookahead == 0


def test_more_may_be_drafted_than_answered(tiny_llm: LLM) -> None:
    ids = prompt(7)
    policy = dataclasses.replace(NO_TSP, lookahead=40)
    short, long = (tiny_llm.prefill(ids, policy, max_tokens) for max_tokens in (0, 50))
    assert same_kept(short, long)
    assert (short.cache.room, long.cache.room) == (0, 50)


# --- where it is used ---


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_none_is_the_default_and_holds_nothing(tiny_llm: LLM, policy: WindowScored) -> None:
    assert type(policy)(min_tokens=8).lookahead == 0
    assert plan_of(tiny_llm, 160, without(policy)).held_nbytes == 0
    whole = plan_of(tiny_llm, 160, SnapKV(kv_retention=1.0, lookahead=M))
    assert (whole.lookahead, whole.held_nbytes) == (0, 0)


@pytest.mark.parametrize("policy", [TSP, SnapKV(min_tokens=8, lookahead=M), POLICIES[-1]], ids=name_of)
def test_generation_decodes_from_what_the_look_ahead_chose(tiny_llm: LLM, policy: WindowScored) -> None:
    """One prompt, a stream and a list of prompts; slots of the pool are used again."""
    prompts = [prompt(seed, n_tokens=100 + 30 * seed)[0].tolist() for seed in range(3)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = []
    for ids in prompts:
        pre = prefill_until(tiny_llm, torch.tensor([ids]), policy, [])
        tokens = [pre.logits.argmax(-1)]
        for _ in range(5):
            tokens.append(tiny_llm.decode(pre.cache, tokens[-1]).argmax(-1))
        expected.append([int(token) for token in tokens])
    assert [out.token_ids for out in tiny_llm.generate(prompts, params, policy, batch_size=2)] == expected
    assert [tiny_llm.generate(ids, params, policy).token_ids for ids in prompts] == expected
    assert [piece.token_id for piece in tiny_llm.stream(prompts[1], params, policy)] == expected[1]


def test_the_draft_is_greedy_whatever_samples_the_answer(tiny_llm: LLM) -> None:
    ids = prompt(8)[0].tolist()
    kept = []
    for params in (
        SamplingParams(max_tokens=3, ignore_eos=True),
        SamplingParams(max_tokens=3, ignore_eos=True, temperature=2.0, top_k=7, seed=1, repetition_penalty=3.0),
    ):
        stream = tiny_llm.stream(ids, params, TSP, keep_selection=True)
        next(stream)
        assert stream.selection is not None
        kept.append(stream.selection[1])
        stream.close()
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))


@pytest.mark.parametrize("policy", [TSP, NO_TSP], ids=name_of)
def test_a_sequence_that_continues_looks_ahead_too(tiny_llm: LLM, policy: WindowScored) -> None:
    """Earlier entries and new tokens are scored by the draft, where the policy chooses anew among them."""
    first, then = prompt(9, n_tokens=120), prompt(10, n_tokens=90)
    pieces = [tiny_llm.prefill(first, without(policy), 3) for _ in range(2)]
    base = tiny_llm.prefill(then, without(policy), 3, cache=pieces[0].cache)
    ahead = tiny_llm.prefill(then, policy, 3, cache=pieces[1].cache)
    assert torch.equal(ahead.logits, base.logits)
    assert not same_kept(ahead, base)
    assert [of.shape for of in ahead.kept] == [of.shape for of in base.kept]
    assert (ahead.cache.position, ahead.cache.room) == (base.cache.position, base.cache.room) == (210, 3)
    tiny_llm.decode(ahead.cache, ahead.logits.argmax(-1))


def test_a_policy_that_keeps_what_was_kept_does_not(tiny_llm: LLM) -> None:
    policy = AdaKV(min_tokens=8, lookahead=M)
    pre = tiny_llm.prefill(prompt(9, n_tokens=120), policy, 90)
    more = tiny_llm.prefill(prompt(10, n_tokens=60), policy, 3, cache=pre.cache)
    assert (more.cache.position, more.cache.room) == (180, 3)


# --- memory ---


def test_what_is_held_is_counted(tiny_llm: LLM) -> None:
    """K and V of all tokens up to the TSP layer, of the propagated ones after it."""
    config = tiny_llm.config
    one = 2 * config.n_kv_heads * config.head_dim * 4
    assert plan_of(tiny_llm, 160, NO_TSP).held_nbytes == config.n_layers * (160 + M) * one
    assert plan_of(tiny_llm, 160, TSP).held_nbytes == (2 * 160 + (config.n_layers - 2) * 80 + config.n_layers * M) * one


def test_a_prompt_whose_hold_has_no_room_is_refused(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, params = prompt(11), SamplingParams(max_tokens=4)
    plan = plan_of(tiny_llm, 160, NO_TSP, 4)
    tiny_llm.free_buffers()
    others = footprint(tiny_llm.model, plan, plan.nbytes).total - plan.held_nbytes
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: others + plan.held_nbytes // 2)
    with pytest.raises(FastKVError, match=r"lookahead holds until its draft ends.* set lookahead to 0"):
        tiny_llm.generate(ids[0].tolist(), params, NO_TSP)
    with pytest.raises(FastKVError, match="set lookahead to 0"):
        tiny_llm.prefill(ids, NO_TSP, 4)
    tiny_llm.generate(ids[0].tolist(), params, without(NO_TSP))
    pre = tiny_llm.prefill(ids, without(NO_TSP), 4)
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: 0)
    with pytest.raises(FastKVError, match="set lookahead to 0"):  # its cache has room, the hold has none
        tiny_llm.prefill(prompt(12), NO_TSP, 4, cache=pre.cache)


def test_a_draft_that_fails_leaves_no_usable_cache(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pre = tiny_llm.prefill(prompt(9, n_tokens=120), TSP, 3)

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("fastkv.engine.lookahead.run_layers", fail)
    with pytest.raises(RuntimeError):
        tiny_llm.prefill(prompt(10, n_tokens=90), TSP, 3, cache=pre.cache)
    with pytest.raises(FastKVError, match="left by a prefill that failed"):
        tiny_llm.decode(pre.cache, torch.tensor([5]))


# --- the setting ---


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_a_wrong_value_is_refused(value: object) -> None:
    with pytest.raises(FastKVError, match="lookahead"):
        FastKV(lookahead=value)  # type: ignore[arg-type]


def test_the_flag(archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("the code of box 12 is 4711. " * 40)
    command = ["--model", str(archive_folder), "--prompt", str(file), "--max-tokens", "2", "--json"]
    assert main([*command, "--min-tokens", "16", "--lookahead", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"]["lookahead"] == 4
    assert main([*command, "--policy", "full", "--lookahead", "4"]) != 0
    assert "--lookahead" in capsys.readouterr().err
