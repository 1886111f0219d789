"""Policies that find during the prefill where tokens are dropped, and the one that reads its choice anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from caches import let_overflow
from torch import Tensor

from fastkv import ASL, LLM, FastKV, FastKVError, FullKV, GemFilter, SamplingParams, StructKV
from fastkv.cache.policies.asl import relative_variance
from fastkv.cache.policies.online import OnlineTSP
from fastkv.cache.policies.structkv import figures_of
from fastkv.cache.policy import OnlineSelector, Policy, Stage
from fastkv.cache.scores import ranks
from fastkv.cache.selection import select_tokens

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))
ONLINE: list[type[Any]] = [ASL, StructKV]


def layer_of(selector: OnlineSelector | None, layers: Sequence[Tensor]) -> tuple[int, Tensor]:
    """The layer that a selector finds, given the scores of one layer after the other, and its importance scores."""
    assert selector is not None
    for layer, scores in enumerate(layers):
        importance = selector(layer, scores)
        if importance is not None:
            return layer, importance
    raise AssertionError("it found no layer")


def shuffled(n: int, seed: int) -> Tensor:
    """Scores [1, 2, n] in random order."""
    return torch.rand(1, 2, n, generator=torch.Generator().manual_seed(seed))


# --- in the engine ---


@pytest.mark.parametrize("policy", [ASL, StructKV])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("keep", [90, 8])  # the last: nothing but the window, so that no score is left to be asked for
@pytest.mark.parametrize("latest", [4, 5])  # the last but one; the last, which would have been too late
def test_tokens_are_dropped_where_the_selector_says(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: type[OnlineTSP], at: int, keep: int, latest: int
) -> None:
    """Then it is FastKV with that layer as its TSP layer."""
    monkeypatch.setattr(
        policy, "online_selector", lambda self, *sizes: lambda layer, scores: scores if layer == at else None
    )
    settings = {"tsp_rate": keep / 300, "kv_retention": 0.2, "min_tokens": 8}
    online = tiny_llm.prefill(PROMPT, policy(tsp_layer=latest, **settings))
    fixed = tiny_llm.prefill(PROMPT, FastKV.paper(tsp_layer=at, **settings))
    assert online.layer_tokens == fixed.layer_tokens == [300] * (at + 1) + [keep] * (5 - at)
    assert all(torch.equal(a, b) for a, b in zip(online.kept, fixed.kept, strict=True))
    torch.testing.assert_close(online.logits, fixed.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ONLINE)
def test_fewer_entries_than_planned_leave_nothing_of_old(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: type[OnlineTSP]
) -> None:
    """A budget above what is propagated: layers after an early TSP layer keep less than the latest would have let."""
    monkeypatch.setattr(
        policy, "online_selector", lambda self, *sizes: lambda layer, scores: scores if layer == 1 else None
    )
    made, params = policy(tsp_layer=4, tsp_len=20, kv_len=100), SamplingParams(max_tokens=6, ignore_eos=True)
    tiny_llm.free_buffers()
    fresh = tiny_llm.generate(PROMPT[0].tolist(), params, made)
    assert fresh.metrics.layer_tokens == (300, 300, 20, 20, 20, 20)
    assert fresh.metrics.kv_entries == 2 * (100 + 100 + 4 * 20)
    tiny_llm.generate(PROMPT[0].tolist(), params, FullKV())
    let_overflow(tiny_llm, [PROMPT[0].tolist()], FullKV())
    assert tiny_llm.generate(PROMPT[0].tolist(), params, made).token_ids == fresh.token_ids
    tiny_llm.free_buffers()


@pytest.mark.parametrize("policy", [ASL(kv_len=40, tsp_len=60), StructKV(kv_len=40, tsp_len=60), GemFilter(kv_len=40)])
def test_every_way_through_a_layer_gives_the_same(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    expected = tiny_llm.prefill(PROMPT, policy)
    for chunk, narrow in ((64, True), (64, False), (4096, False)):
        monkeypatch.setattr("fastkv.engine.projection.CHUNK", chunk)
        monkeypatch.setattr("fastkv.engine.prefill._propagated_only_pays", lambda *_, narrow=narrow: narrow)
        other = tiny_llm.prefill(PROMPT, policy)
        torch.testing.assert_close(other.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(other.kept, expected.kept, strict=True))
        assert other.layer_tokens == expected.layer_tokens


@pytest.mark.parametrize("policy", ONLINE)
def test_no_reduction_without_a_rate(tiny_llm: LLM, policy: type[OnlineTSP]) -> None:
    for settings in ({"tsp_rate": 1.0}, {"tsp_len": 300}, {"first_layer": 5, "tsp_layer": 5}, {"min_tokens": 300}):
        assert policy(**settings).stages(6, 300) == [Stage(range(6))]
    assert tiny_llm.prefill(PROMPT, policy(tsp_rate=1.0, kv_len=40)).layer_tokens == [300] * 6


@pytest.mark.parametrize("policy", ONLINE)
def test_nothing_is_dropped_after_the_last_layer(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: type[OnlineTSP]
) -> None:
    monkeypatch.setattr(
        policy, "online_selector", lambda self, *sizes: lambda layer, scores: scores if layer == 5 else None
    )
    online = tiny_llm.prefill(PROMPT, policy(tsp_layer=5, tsp_len=60, kv_len=40))
    fixed = tiny_llm.prefill(PROMPT, FastKV.paper(tsp_layer=5, tsp_len=60, kv_len=40))
    assert online.layer_tokens == fixed.layer_tokens == [300] * 6
    assert all(torch.equal(a, b) for a, b in zip(online.kept, fixed.kept, strict=True))
    torch.testing.assert_close(online.logits, fixed.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ONLINE)
def test_layers_are_checked(policy: type[OnlineTSP]) -> None:
    with pytest.raises(FastKVError, match="tsp_layer must be below") as caught:
        policy(tsp_layer=6).validate(6)
    assert caught.value.setting == "tsp_layer"
    with pytest.raises(FastKVError, match="first_layer must be at most") as caught:
        policy(first_layer=4, tsp_layer=3).validate(6)
    assert caught.value.setting == "first_layer"
    for settings in ({"tsp_rate": 0}, {"tsp_len": 7}, {"first_layer": -1}, {"tsp_layer": 1.5}, {"kernel": 4}):
        with pytest.raises(FastKVError):
            policy(**settings)
    for n_layers in (1, 2, 3, 5, 8, 32, 36):
        policy().validate(n_layers)
        policy(tsp_layer=0).validate(n_layers)


# --- ASL ---


def test_ranks_count_from_the_best() -> None:
    assert ranks(torch.tensor([[0.1, 0.9, 0.5], [3, 1, 2]])).tolist() == [[2, 0, 1], [0, 2, 1]]


def test_ranks_in_random_order_vary_by_one() -> None:
    by_layer = [ranks(shuffled(2000, seed).sum(1)) for seed in range(60)]
    assert float(relative_variance(by_layer, torch.arange(2000)[None])) == pytest.approx(1, abs=0.02)
    assert float(relative_variance(by_layer[:1] * 3, torch.arange(2000)[None])) == 0


def test_the_layer_where_ranks_have_settled() -> None:
    """Random order up to layer 5, then always the same: three layers of it are there at layer 8."""
    layers = [shuffled(500, seed) for seed in range(6)] + [shuffled(500, 6)] * 6
    policy = ASL(first_layer=2, tau=1e-6, tsp_len=50)
    layer, importance = layer_of(policy.online_selector(14, 508), layers)
    assert layer == 8
    assert importance is layers[8]
    assert layer_of(ASL(first_layer=10, tau=1e-6, tsp_len=50).online_selector(14, 508), layers)[0] == 10
    assert layer_of(ASL(first_layer=2, tau=1e-6, lookback=2, tsp_len=50).online_selector(14, 508), layers)[0] == 7
    assert layer_of(ASL(first_layer=2, tau=5, tsp_len=50).online_selector(14, 508), layers)[0] == 2
    assert (
        layer_of(ASL(tau=1e-6, tsp_layer=4, tsp_len=50).online_selector(14, 508), layers)[0] == 4
    )  # none settles: the latest


def test_only_the_tokens_that_would_be_propagated_must_have_settled() -> None:
    steady = torch.arange(500.0)[None, None].expand(1, 2, -1)
    layers = []
    for seed in range(6):
        noise = shuffled(500, seed)
        noise[..., 400:] = steady[..., 400:]  # the best hundred keep their places
        layers.append(noise)
    assert layer_of(ASL(first_layer=2, tau=1e-6, tsp_len=108).online_selector(8, 508), layers)[0] == 2
    assert layer_of(ASL(first_layer=2, tau=1e-6, tsp_len=208).online_selector(7, 508), layers)[0] == 5  # the latest


def test_where_only_the_window_is_propagated_the_best_token_must_have_settled() -> None:
    layers = [shuffled(500, seed) for seed in range(6)] + [shuffled(500, 6)] * 6
    assert layer_of(ASL(first_layer=2, tau=1e-6, tsp_len=8).online_selector(14, 508), layers)[0] == 8


def test_the_defaults_are_the_papers_in_proportion() -> None:
    assert ASL().layers_of(32) == (10, 30)
    assert ASL().layers_of(8) == (2, 6)
    assert ASL(tsp_layer=1).layers_of(8) == (1, 1)
    assert StructKV().layers_of(32) == (8, 15)


# --- StructKV ---


def test_figures_of_scores() -> None:
    even, single = torch.ones(1, 8), torch.eye(8)[:1]
    torch.testing.assert_close(figures_of(even), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(figures_of(single), torch.tensor([[0.0, 7 / 8, (1 - 1 / 8) ** 0.5]]))
    torch.testing.assert_close(figures_of(5 * even), figures_of(even))


def test_the_pivot_is_where_the_largest_change_is_known() -> None:
    """Scores up to it, the earlier the less they weigh."""
    even, peaked = torch.ones(1, 2, 100), torch.ones(1, 2, 100)
    peaked[..., 7] = 500
    slightly = even.clone()
    slightly[..., 3] = 5
    layers = [even, slightly, slightly, peaked, 1.01 * peaked, even, even]
    layer, importance = layer_of(StructKV(first_layer=1, tsp_layer=6).online_selector(8, 108), layers)
    assert layer == 2  # the change at layer 1 is a peak already
    torch.testing.assert_close(importance, 0.81 * even + 0.9 * slightly + slightly)
    layer, importance = layer_of(StructKV(first_layer=2, tsp_layer=6).online_selector(8, 108), layers)
    assert layer == 4
    torch.testing.assert_close(importance, 0.9**4 * even + (0.9**3 + 0.9**2) * slightly + (0.9 + 1.01) * peaked)
    layer, importance = layer_of(StructKV(first_layer=2, tsp_layer=3, score_decay=0.5).online_selector(8, 108), layers)
    assert layer == 3
    torch.testing.assert_close(importance, 0.125 * even + 0.25 * slightly + 0.5 * slightly + peaked)
    assert (even == 1).all(), "a layer's scores were changed"


def test_a_change_weighs_entropy_sparsity_and_variance() -> None:
    selector = StructKV().online_selector(8, 108)
    selector(0, torch.ones(1, 2, 8))
    assert selector._change(torch.eye(8)[None, :2] * 0 + torch.eye(8)[0]) == pytest.approx(
        0.2 * 1 + 0.3 * 7 / 8 + 0.5 * (7 / 8) ** 0.5, abs=1e-5
    )
    assert selector._change(torch.ones(1, 2, 8)) > 0
    assert selector._change(torch.ones(1, 2, 8)) == pytest.approx(0, abs=1e-5)


def test_structkv_propagates_by_the_sum(tiny_llm: LLM) -> None:
    seen: list[Tensor] = []
    score = StructKV.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructKV, "score", lambda self, observed: seen.append(score(self, observed)) or seen[-1])
        pre = tiny_llm.prefill(PROMPT, StructKV(first_layer=2, tsp_layer=2, tsp_len=60, kv_len=40))
    expected = select_tokens(0.81 * seen[0] + 0.9 * seen[1] + seen[2], 60, 8)
    assert torch.equal(pre.tokens[3], expected)


# --- GemFilter ---


@torch.inference_mode()
def test_gemfilter_reads_its_choice_anew(tiny_llm: LLM) -> None:
    """The slow twin takes the last query and the keys of layer 2 out of a full pass, and prefills the choice alone."""
    model = tiny_llm._model
    found: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append((q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    model.reserve(300)
    hidden, rope = model.embed(PROMPT), model.rope(torch.arange(300)[None])
    for block in model.blocks[:3]:
        hidden = block.mlp(block.attention(hidden, rope, attend))
    q, k = found[2]
    products = (q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(2, 3)).squeeze(2).sum(1)  # [1, 300]
    pooled = F.avg_pool1d(products, 5, stride=1, padding=2)
    expected = torch.cat((pooled[0, :-1].topk(39).indices.sort().values, torch.tensor([299])))
    pre = tiny_llm.prefill(PROMPT, GemFilter(filter_layer=2, kv_len=40))
    again = tiny_llm.prefill(PROMPT[:, expected], FullKV())
    assert all(torch.equal(tokens[0], expected) for tokens in pre.tokens)
    assert all(torch.equal(kept[0], expected.expand(2, -1)) for kept in pre.kept)
    torch.testing.assert_close(pre.logits, again.logits, atol=1e-5, rtol=1e-5)
    assert pre.cache.next_position.tolist() == [40]
    for token in (5, 9):
        steps = torch.tensor([token])
        torch.testing.assert_close(
            tiny_llm.decode(pre.cache, steps), tiny_llm.decode(again.cache, steps), atol=1e-5, rtol=1e-5
        )


def test_gemfilters_layer() -> None:
    """The paper's 13, 17 and 19 of Llama-3.1-8B, Ministral-8B and Mistral-Nemo."""
    assert [GemFilter().filter_layer_of(n) for n in (32, 36, 40, 8, 1)] == [13, 17, 19, 3, 0]
    assert GemFilter(filter_layer=2).settings(8)["filter_layer"] == 2
    assert GemFilter().first_pass(8, 128) is None
    with pytest.raises(FastKVError, match="filter_layer must be below") as caught:
        GemFilter(filter_layer=8).validate(8)
    assert caught.value.setting == "filter_layer"
    for settings in ({"kernel": 2}, {"filter_layer": -1}, {"kernel": 0}):
        with pytest.raises(FastKVError):
            GemFilter(**settings)
