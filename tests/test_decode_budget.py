"""A decode budget: the entries of each KV head stay bounded while an answer grows, and the best of them stay.

The slow twin here attends to lists of entries, head by head, sums what each receives, and drops by the rule as stated.
"""

from __future__ import annotations

import dataclasses
import logging
from itertools import islice
from typing import Any

import pytest
import torch
from caches import idle_pool, make_pool
from checkpoints import write_one_layer
from test_peak_memory import Alive
from torch import Tensor

from fastkv import LLM, AdaKV, DefensiveKVLayer, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.bounded import BoundedCache
from fastkv.cache.decode_budget import LEAST, SINKS, DecodeBudget
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Policy
from fastkv.engine import graph
from fastkv.engine.compiled_row import CompiledRow
from fastkv.engine.footprint import _Shapes, footprint
from fastkv.engine.generation import Generation

PROMPT = torch.randint(3, 256, (150,), generator=torch.Generator().manual_seed(8)).tolist()
BUDGET = DecodeBudget(40)  # an interval of 10
POLICIES = {
    "full": FullKV(),  # keeps more of the prompt than the budget
    "fastkv": FastKV(min_tokens=8),  # less
    "layers differ": FastKV(tsp_layer=1, tsp_len=20, kv_len=60),  # both
    "heads differ": AdaKV(kv_len=38),  # both, in one layer
    "layers compete": DefensiveKVLayer(kv_len=38),
}
EACH_LAYOUT = pytest.mark.parametrize("name", ["full", "heads differ", "layers compete"])
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def params(max_tokens: int, **choice: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **choice)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Random weights, one KV head of 8, and a sliding window, for answers that take many steps."""
    folder = tmp_path_factory.mktemp("one-layer")
    write_one_layer(folder, 8192, 4096)
    return LLM(folder, dtype="float32", device="cpu", load_format="dummy")


def cache_of(stream: Generation) -> KVCache:
    assert stream._batch is not None
    (sequence,) = stream._batch._at_work.values()
    return sequence.cache


def by_head(cache: KVCache, layer: int) -> list[tuple[Tensor, Tensor]]:
    """k and v [n, D] of each head."""
    return [(part.k[0, h].clone(), part.v[0, h].clone()) for part in cache.read(layer) for h in range(part.k.shape[1])]


def positions_by_head(cache: KVCache, layer: int) -> list[list[int]]:
    return [[p for p in head if p >= 0] for head in cache.positions(layer)[0].tolist()]


class BoundedTwin:
    """Entries as lists, by layer and head: [k, v, position, attention received so far]."""

    def __init__(self, llm: LLM, cache: KVCache) -> None:
        self.llm, self.position = llm, cache.position
        self.heads = [
            [
                [[k, v, position, 0.0] for k, v, position in zip(*entries, places, strict=True)]
                for entries, places in zip(by_head(cache, layer), positions_by_head(cache, layer), strict=True)
            ]
            for layer in range(llm.config.n_layers)
        ]

    def longest(self) -> int:
        return max(len(head) for heads in self.heads for head in heads)

    def evict(self) -> None:
        for heads in self.heads:
            for index, head in enumerate(heads):
                recent = self.position - BUDGET.entries // 2
                pinned = [entry for entry in head if entry[2] < SINKS or entry[2] >= recent]
                others = sorted((e for e in head if SINKS <= e[2] < recent), key=lambda e: -e[3])
                kept = pinned + others[: BUDGET.entries - len(pinned)]
                heads[index] = sorted(kept, key=lambda entry: entry[2])

    @torch.inference_mode()
    def step(self, token: int) -> int:
        model, config = self.llm.model, self.llm.config
        hidden, rope = model.embed(torch.tensor([[token]])), model.rope(torch.tensor([[self.position]]))
        for block, heads in zip(model.blocks, self.heads, strict=True):
            q, k, v = block.project(hidden, rope)
            attended = []
            for index, (head, queries) in enumerate(zip(heads, q[0, :, 0].chunk(config.n_kv_heads), strict=True)):
                head.append([k[0, index, 0], v[0, index, 0], self.position, 0.0])
                keys, values = (torch.stack([entry[i] for entry in head]) for i in (0, 1))
                weights = (queries @ keys.T / config.head_dim**0.5).softmax(-1)
                attended.append(weights @ values)
                for entry, received in zip(head, weights.sum(dim=0).tolist(), strict=True):
                    entry[3] += received
            block.finish_(hidden, torch.cat(attended)[None, :, None])
        self.position += 1
        return int(model.head(hidden[:, -1]).argmax())


@EACH_POLICY
def test_what_stays_is_what_received_most(tiny_llm: LLM, policy: Policy) -> None:
    """Tokens, entries, positions and sums, through several evictions."""
    stream = tiny_llm.stream(PROMPT, params(56), policy, decode_budget=BUDGET.entries)
    token = next(stream).token_id
    cache = cache_of(stream)
    assert isinstance(cache, BoundedCache)
    twin = BoundedTwin(tiny_llm, cache)
    longest = twin.longest()
    left = BUDGET.interval if cache.pool.layout.per_head else max(longest, BUDGET.entries) + BUDGET.interval - longest
    evicted = 0
    for piece in islice(stream, 52):
        if left == 0:
            twin.evict()
            left, evicted = BUDGET.entries + BUDGET.interval - twin.longest(), evicted + 1
        token, left = twin.step(token), left - 1
        assert token == piece.token_id
    assert evicted >= 2
    for layer, heads in enumerate(twin.heads):
        assert positions_by_head(cache, layer) == [[entry[2] for entry in head] for head in heads]
        for index, (head, (k, v)) in enumerate(zip(heads, by_head(cache, layer), strict=True)):
            torch.testing.assert_close(k, torch.stack([entry[0] for entry in head]), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(v, torch.stack([entry[1] for entry in head]), atol=1e-5, rtol=1e-4)
            sums = torch.tensor([entry[3] for entry in head])
            torch.testing.assert_close(cache.sums[layer][index, : len(head)], sums, atol=1e-4, rtol=1e-4)
            assert not cache.sums[layer][index, len(head) :].any()
    stream.close()


@EACH_POLICY
def test_no_head_holds_more_than_the_budget_and_an_interval(tiny_llm: LLM, policy: Policy) -> None:
    stream = tiny_llm.stream(PROMPT, params(48), policy, decode_budget=BUDGET.entries)
    next(stream)
    cache = cache_of(stream)
    most = []
    for _ in islice(stream, 44):
        most.append(int(cache.lengths.max()))
        assert [cache.count(layer) for layer in range(6)] == cache.lengths.amax(dim=(1, 2)).tolist()
    stream.close()
    assert max(most[BUDGET.interval :]) == BUDGET.entries + BUDGET.interval


def test_a_long_answer_takes_no_more_memory_than_a_short_one(one_layer: LLM) -> None:
    long, short = (one_layer.generate(PROMPT, params(n), FullKV(), decode_budget=LEAST) for n in (500, 200))
    assert len(long.token_ids) == 500
    assert long.token_ids[:200] == short.token_ids
    assert long.metrics.kv_bytes == short.metrics.kv_bytes == 160 * 2 * 8 * 4  # 150 + 8 entries, in whole blocks
    assert idle_pool(one_layer).nbytes == long.metrics.kv_bytes
    assert long.metrics.kv_full_bytes == 672 * 2 * 8 * 4


@EACH_LAYOUT
def test_where_nothing_must_go_the_answer_is_the_plain_one(tiny_llm: LLM, name: str) -> None:
    """Neither where the budget is larger than all there is, nor where the answer ends before the first eviction."""
    policy = POLICIES[name]
    plain = tiny_llm.generate(PROMPT, params(40), policy)
    bounded = tiny_llm.generate(PROMPT, params(40), policy, decode_budget=200)
    assert bounded.token_ids == plain.token_ids
    assert bounded.metrics.kv_bytes == plain.metrics.kv_bytes
    start = tiny_llm.generate(PROMPT, params(14), policy, decode_budget=LEAST).token_ids
    assert start[: LEAST // 4] == plain.token_ids[: LEAST // 4]


@EACH_LAYOUT
def test_each_row_of_a_batch_is_the_prompt_alone(tiny_llm: LLM, name: str) -> None:
    """Each drops its entries at its own time; one, whose answer is short, none at all."""
    policy = POLICIES[name]
    prompts = [PROMPT[:30], PROMPT, PROMPT[40:60], PROMPT[:99]]
    each = [params(36), params(22), params(3), params(20, temperature=0.9, seed=3)]
    budget = LEAST
    alone = [
        tiny_llm.generate(p, chosen, policy, decode_budget=budget).token_ids
        for p, chosen in zip(prompts, each, strict=True)
    ]
    together = tiny_llm.generate(prompts, each, policy, decode_budget=budget, batch_size=3)
    assert [output.token_ids for output in together] == alone


def test_the_best_of_a_head_by_hand() -> None:
    budget = DecodeBudget(32)  # the newest 16
    positions = torch.stack([torch.arange(48), torch.cat((torch.arange(8, 48), torch.full((8,), -1)))])
    sums = torch.zeros(2, 48)
    sums[0, 20:29], sums[0, 29] = 1.0, 0.4
    sums[0, 4:9] = 0.5  # five that are alike, of which three have room
    sums[1, 20], sums[1, 45] = 1.0, 99.0  # the second is no entry
    first, second = budget.best(sums, positions, end=48).tolist()
    assert first == [*range(SINKS), 4, 5, 6, *range(20, 29), *range(32, 48)]
    assert second == [*range(15), 20, *range(24, 40)]


def evicted_cache(llm: LLM, policy: Policy) -> tuple[Generation, BoundedCache]:
    """A cache in the step after an eviction, and its stream, which must not be forgotten meanwhile."""
    stream = llm.stream(PROMPT, params(60), policy, decode_budget=BUDGET.entries)
    next(stream)
    cache = cache_of(stream)
    assert isinstance(cache, BoundedCache)
    while not cache.whole_from > len(PROMPT):
        next(stream)
    return stream, cache


@EACH_LAYOUT
def test_what_was_dropped_cannot_come_back(tiny_llm: LLM, name: str) -> None:
    policy = POLICIES[name]
    stream, cache = evicted_cache(tiny_llm, policy)
    for _ in range(3):
        next(stream)
    before, sums = [positions_by_head(cache, layer) for layer in range(6)], [each.clone() for each in cache.sums]
    assert cache.position - cache.whole_from == 4
    with pytest.raises(FastKVError, match="can forget its last 4 tokens, not 5"):
        cache.truncate(5)
    with torch.inference_mode():
        cache.truncate(2)
    for layer, heads in enumerate(before):
        assert positions_by_head(cache, layer) == [head[:-2] for head in heads]
        for head, (was, now) in enumerate(zip(sums[layer], cache.sums[layer], strict=True)):
            count = len(heads[head]) - 2
            assert torch.equal(now[:count], was[:count])
            assert not now[count:].any()
    assert cache._steps_left + 4 - 2 == BUDGET.steps(max(len(head) - 4 for heads in before for head in heads))
    stream.close()


def test_the_first_entries_that_are_sinks_are_those_of_the_first_positions(tiny_llm: LLM) -> None:
    _, cache = evicted_cache(tiny_llm, FullKV())
    assert cache.positions(0)[0, :, :SINKS].tolist() == [[0, 1, 2, 3]] * 2


@EACH_LAYOUT
def test_the_footprint_knows_of_sums_and_of_evictions(tiny_llm: LLM, name: str) -> None:
    policy = POLICIES[name]
    stream = tiny_llm.stream(PROMPT, params(60), policy, decode_budget=BUDGET.entries)
    next(stream)
    cache, plan = cache_of(stream), stream._answer.request.plan
    assert isinstance(cache, BoundedCache)
    shapes = _Shapes.of(tiny_llm.model, plan, 1)
    while cache._steps_left or not cache.sums:
        next(stream)
    held = sum(each.nbytes for each in cache.sums)
    positions = sum(cache.positions(layer).numel() * 8 for layer in range(6))
    per_head = cache.pool.layout.per_head  # whose longest head may have all that there is
    assert held + positions <= shapes.sums(BUDGET) <= (5 if per_head else 1.3) * (held + positions)
    alive = Alive(tiny_llm.model)
    there = [cache.pool.lengths, cache.pool.starts, *cache.sums, *(each for each in cache._chosen if each is not None)]
    there += [memory for layer in cache.pool.layers for memory in layer.flat() or ()]
    alive.before |= {tensor.untyped_storage()._cdata for tensor in there}
    with alive, torch.inference_mode():
        cache._evict()
    made = alive.peak - sum(each.nbytes for each in (*cache.sums, *(k for k in cache._chosen if k is not None)))
    assert made <= shapes.evicting(BUDGET) <= 2.5 * made
    with_it, without = (
        footprint(tiny_llm.model, each, plan.nbytes) for each in (plan, dataclasses.replace(plan, decode_budget=None))
    )
    assert with_it.lists - without.lists == shapes.sums(BUDGET)
    assert with_it.step >= shapes.evicting(BUDGET)
    stream.close()


@pytest.mark.parametrize("way", ["replayed", "compiled"])
def test_other_kinds_of_steps_give_way_to_eager_ones_and_say_so_once(
    tiny_llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stand_in_compiler: list[Any],
    traced_once: None,
    way: str,
) -> None:
    """One step ahead, too, as on a GPU: what was launched after the last token is never read."""
    expected = tiny_llm.generate(PROMPT, params(40), FullKV(), decode_budget=LEAST).token_ids
    runtime = tiny_llm._runtime
    monkeypatch.setattr(runtime, "_said_eager", False)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("no step of a bounded cache")

    if way == "replayed":
        monkeypatch.setattr(graph, "_CudaRecorder", refused)
        monkeypatch.setattr(type(runtime), "ahead", True)
        monkeypatch.setattr(runtime, "cuda_graph", True)
    else:
        row = CompiledRow(tiny_llm.model, {})
        monkeypatch.setattr(row, "logits", refused)
        monkeypatch.setattr(tiny_llm.model, "row", row)
    with caplog.at_level(logging.WARNING, "fastkv"):
        for prompt in (PROMPT, [PROMPT, PROMPT[:60]]):
            found = tiny_llm.generate(prompt, params(40), FullKV(), decode_budget=LEAST)
            assert (found[0] if isinstance(found, list) else found).token_ids == expected
    what = "are made without CUDA graphs" if way == "replayed" else "have attention that is not compiled"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"answers with a decode_budget {what}, which is slower"]
    tiny_llm.free_buffers()


@pytest.mark.parametrize("wrong", [0, -1, LEAST - 1, 1.5, "64", True, 10**30])
def test_a_budget_that_is_none(tiny_llm: LLM, wrong: Any) -> None:
    for ask in (tiny_llm.generate, tiny_llm.stream, lambda p, **rest: tiny_llm.generate_each([p], **rest)):
        with pytest.raises(FastKVError, match=f"decode_budget must be a whole number of at least {LEAST}") as caught:
            ask(PROMPT, decode_budget=wrong)
        assert caught.value.setting == "decode_budget"


def test_a_sliding_window_is_the_limit_where_entries_may_go(one_layer: LLM) -> None:
    """As where a policy drops tokens: which entries have left the window is not tracked."""
    long = PROMPT * 28  # 4,200
    assert one_layer.generate(long, params(1), FullKV()).finish_reason == "length"
    with pytest.raises(FastKVError, match="sliding_window of 4096, where decode_budget cannot drop entries; leave it"):
        one_layer.generate(long, params(1), FullKV(), decode_budget=64)
    with pytest.raises(FastKVError, match=r"max_tokens must be at most 3946.*; use policy full without decode_budget"):
        one_layer.generate(PROMPT, params(4000), FullKV(), decode_budget=64)


def test_only_a_sequence_alone_is_bounded() -> None:
    pool = make_pool(DenseLayer, n_slots=2)
    with pytest.raises(AssertionError, match="different times"):
        BoundedCache(pool, pool.take_all(), 4, 1000, BUDGET, 10)
