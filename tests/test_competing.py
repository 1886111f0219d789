"""Layers that compete for the budgets of the whole model: their memory, who wins, and what decoding reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from caches import live_entries, make_pool
from test_continuing import CLOSE, SlowTwin
from torch import Tensor

from fastkv import LLM, DefensiveKV, DefensiveKVLayer, FastKVError, SamplingParams
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.selection import PerHead
from fastkv.engine.footprint import footprint
from fastkv.engine.plan import plan_request, position_limit

IDS = torch.randint(3, 256, (2, 300), generator=torch.Generator().manual_seed(11))
BUDGET = 40
PLAIN = {"kv_len": BUDGET, "head_floor": 0.0, "certain_mass": 0.0}  # nothing is certain but the window


@dataclass(frozen=True, kw_only=True)
class Watched(DefensiveKVLayer):
    """Keeps the scores that it gives out budgets by."""

    name: ClassVar[str] = "watched"
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def model_budgets(self, counts: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        self.seen.extend(scores)
        return super().model_budgets(counts, scores)


def test_the_best_of_the_whole_model_win(tiny_llm: LLM) -> None:
    policy = Watched(**PLAIN)
    pre = tiny_llm.prefill(IDS, policy, 4)
    n_layers, n_heads = tiny_llm.config.n_layers, tiny_llm.config.n_kv_heads
    for row in range(2):
        scored = [
            (float(scores[row, head, token]), layer, head, token)
            for layer, scores in enumerate(policy.seen)
            for head in range(n_heads)
            for token in range(scores.shape[2])
        ]
        best = sorted(scored, reverse=True)[: n_layers * n_heads * (BUDGET - policy.window)]
        winners = {(layer, head, token) for _, layer, head, token in best}
        winners |= {
            (layer, head, 299 - i) for layer in range(n_layers) for head in range(n_heads) for i in range(policy.window)
        }
        kept = {
            (layer, head, token)
            for layer in range(n_layers)
            for head in range(n_heads)
            for token in pre.kept[layer][row, head].tolist()
            if token >= 0
        }
        assert kept == winners
    entries = {sum(layer.entries(slot) for layer in pre.cache.layers) for slot in pre.cache.slots}
    assert entries == {n_layers * n_heads * BUDGET}
    assert len({layer.entries(pre.cache.slots[0]) for layer in pre.cache.layers}) > 1, "all layers have won the same"


def test_every_head_has_its_floor(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(IDS[:1], DefensiveKVLayer(**{**PLAIN, "head_floor": 0.5}), 4)
    fewest = min(int((heads >= 0).sum(dim=-1).min()) for heads in pre.kept)
    assert fewest >= 8 + (BUDGET - 8) // 2


def test_steps_attend_to_what_has_won(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(IDS[:1], DefensiveKVLayer(**PLAIN), 8)
    slow = SlowTwin(tiny_llm, pre.cache, 300)
    new = IDS[1:, :5]
    torch.testing.assert_close(tiny_llm.decode(pre.cache, new), slow.run(new), **CLOSE)
    more = IDS[1:, 5:90]  # no room for these: the entries move to a larger pool
    torch.testing.assert_close(tiny_llm.prefill(more, cache=pre.cache).logits, slow.run(more)[:, -1], **CLOSE)


def test_a_batch_gives_what_its_prompts_give_alone(tiny_llm: LLM) -> None:
    policy = DefensiveKVLayer(kv_len=BUDGET)
    both = tiny_llm.prefill(IDS, policy, 2)
    for row in range(2):
        alone = tiny_llm.prefill(IDS[row : row + 1], policy, 2)
        for layer, positions in enumerate(alone.kept):
            of_row = both.kept[layer][row]
            assert [head[head >= 0].tolist() for head in of_row] == [head[head >= 0].tolist() for head in positions[0]]
    prompts, params = [row.tolist() for row in IDS], SamplingParams(max_tokens=6, ignore_eos=True)
    together = tiny_llm.generate(prompts, params, policy)
    assert [out.token_ids for out in together] == [tiny_llm.generate(one, params, policy).token_ids for one in prompts]


def test_a_short_prompt_is_kept_whole(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(IDS[:, :60], DefensiveKVLayer(), 4)
    assert all(torch.equal(kept, torch.arange(60).expand(2, 2, -1)) for kept in pre.kept)


def test_the_cache_takes_no_more_than_that_of_equal_layers(tiny_llm: LLM) -> None:
    wide, narrow = (tiny_llm.prefill(IDS, policy(kv_len=BUDGET), 4).cache for policy in (DefensiveKVLayer, DefensiveKV))
    assert (wide.nbytes, wide.entries) == (narrow.nbytes, narrow.entries)


def test_what_is_held_until_the_last_layer_counts(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llm.config
    whole = 2 * 300 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    tiny_llm.free_buffers()
    tiny_llm.model.reserve(400)  # the rotary table is the model's
    policy = DefensiveKV(kv_len=BUDGET)
    plan = plan_request(config, policy, 300, 1, tiny_llm.dtype, position_limit(config, policy, 300))
    others = footprint(tiny_llm.model, plan, plan.nbytes).total
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: others + whole // 2)
    assert tiny_llm.generate(IDS[0].tolist(), SamplingParams(max_tokens=1), DefensiveKV(kv_len=BUDGET))
    tiny_llm.free_buffers()
    with pytest.raises(FastKVError, match=r"until the last layer.* take another policy"):
        tiny_llm.prefill(IDS[:1], DefensiveKVLayer(kv_len=BUDGET), 1)


@dataclass(frozen=True, kw_only=True)
class Uneven(DefensiveKVLayer):
    """One layer keeps everything, which the others' competition knows nothing of."""

    name: ClassVar[str] = "uneven"

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return n_tokens if layer == 1 else super().budget(layer, n_layers, n_tokens)


def test_layers_that_compete_have_one_budget(tiny_llm: LLM) -> None:
    with pytest.raises(FastKVError, match=r"uneven: layers that compete .* same budget \(layer 1, 300 tokens\)"):
        tiny_llm.prefill(IDS, Uneven(kv_len=BUDGET), 4)


def store(layer: ModelWideLayer, slot: int, counts: list[int], value: float, room: int = 2) -> None:
    """Of five entries in each of two heads the first ones, as many as `counts` says."""
    index = [head * 5 + token for head, count in enumerate(counts) for token in range(count)]
    k = torch.full((1, 2, 5, 3), float(value))
    layer.store(range(slot, slot + 1), k, -k, PerHead(torch.tensor([counts]), torch.tensor([index]), 5), room)


def test_a_layer_takes_what_another_does_without() -> None:
    pool = make_pool(ModelWideLayer, (5, 5), n_slots=2)
    first, second = pool.layers
    for slot in (1, 0):
        store(first, slot, [1, 1], 1 + slot)
        store(second, slot, [5, 4], 3 + slot, room=1)
    assert (first.rows, pool.nbytes) == (20, 2 * 2 * 20 * 3 * 4)
    for slot in range(2):
        assert [first.entries(slot), second.entries(slot)] == [2, 9]
        for index, count in ((0, 1), (1, 5)):
            (k, _) = live_entries(pool, index, slot, 0)
            assert len(k) == count
            assert (k == 1 + 2 * index + slot).all()
    pool.release(range(1))
    assert not any(rows[:20].any() for layer in pool.layers for rows in layer.flat() or ()), "something is left"
    assert [len(live_entries(pool, 1, 1, head)[0]) for head in range(2)] == [5, 4], "another slot has lost entries"
