"""The prefill loop against a slow twin that computes everything for every token and gathers as late as it can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv import LLM, FastKV, FullKV
from fastkv.cache.policies.fastkv import PAPER
from fastkv.cache.policy import Observation
from fastkv.engine.attention import attend_from, causal_attention
from fastkv.models.layers import MLP


def prompt(n_tokens: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(3, 256, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


@dataclass
class Twin:
    logits: Tensor
    kept: list[Tensor]  # per layer [Hkv, n] positions
    k: list[Tensor]  # per layer [Hkv, n, D]
    v: list[Tensor]


def slow_prefill(llm: LLM, ids: Tensor, policy: FastKV) -> Twin:
    """One prompt [1, N]: K/V repeated to the query heads, an explicit mask, the MLP before the gather, no cache."""
    model, config = llm._model, llm.config
    n_tokens = ids.shape[1]
    twin = Twin(torch.empty(0), [], [], [])
    positions = torch.arange(n_tokens)
    model.reserve(n_tokens)
    hidden = model.embed(ids)
    for layer, block in enumerate(model.blocks):
        seen: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen[:] = [q, k, v]
            group = q.shape[1] // k.shape[1]
            logits = q @ k.repeat_interleave(group, 1).transpose(2, 3) / q.shape[-1] ** 0.5
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), float("-inf"))
            return logits.softmax(-1) @ v.repeat_interleave(group, 1)

        hidden = block.mlp(block.attention(hidden, model.rope(positions[None]), attend))
        q, k, v = seen
        budget = min(policy.budget(layer, config.n_layers, n_tokens), len(positions))
        indices = torch.arange(len(positions)).expand(config.n_kv_heads, -1)
        scores = torch.empty(0)
        observed = Observation(layer, q, k, v)
        if len(positions) > policy.window:
            scores = policy.score(observed)  # which has a slow twin of its own, as the two rankings: test_scores.py
        if budget < len(positions):
            best = policy.ranking(observed, scores, budget)[0].topk(budget - policy.window).indices.sort().values
            indices = torch.cat((best, indices[:, -policy.window :]), 1)
        twin.kept.append(positions[indices])
        index = indices[..., None].expand(-1, -1, config.head_dim)
        twin.k.append(k[0].gather(1, index))
        twin.v.append(v[0].gather(1, index))
        ends = {stage.layers[-1]: stage.keep for stage in policy.stages(config.n_layers, n_tokens)}
        keep = ends.get(layer)
        if keep is not None:
            best = policy.importance(observed, scores, keep)[0].sum(0).topk(keep - policy.window).indices.sort().values
            chosen = torch.cat((best, torch.arange(len(positions) - policy.window, len(positions))))
            hidden, positions = hidden[:, chosen], positions[chosen]
    twin.logits = model.head(hidden[:, -1])
    return twin


CASES: list[dict[str, Any]] = [
    {"min_tokens": 8},
    {"tsp_layer": 0, "tsp_rate": 0.5, "kv_retention": 0.05, "min_tokens": 8},
    {"tsp_layer": 4, "tsp_rate": 0.3, "kv_retention": 0.9, "min_tokens": 8, "pooling": "avg"},
    {"tsp_len": 40, "kv_len": 100, "window": 16, "reach": 3},
    {"tsp_rate": 1.0, "min_tokens": 8},
    {"kv_retention": 1.0, "min_tokens": 8},
    {"tsp_layer": 5, "min_tokens": 8},
    {"tsp_layer": (0, 2, 4), "tsp_rate": (0.6, 0.3, 0.1), "min_tokens": 8},
    PAPER,
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@torch.inference_mode()
def test_prefill_equals_its_slow_twin(tiny_llm: LLM, settings: dict[str, Any]) -> None:
    ids = prompt(211)
    policy = FastKV(**settings)
    fast, slow = tiny_llm.prefill(ids, policy), slow_prefill(tiny_llm, ids, policy)
    torch.testing.assert_close(fast.logits, slow.logits, atol=1e-4, rtol=1e-4)
    for layer in range(tiny_llm.config.n_layers):
        assert torch.equal(fast.kept[layer][0], slow.kept[layer])
        (part,) = fast.cache.read(layer)
        torch.testing.assert_close(part.k[0], slow.k[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(part.v[0], slow.v[layer], atol=1e-4, rtol=1e-4)
        assert torch.equal(fast.cache.positions(layer), fast.kept[layer])


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8), FastKV(tsp_layer=0, min_tokens=8, kv_len=300)])
def test_every_way_through_a_layer_gives_the_same(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: FullKV | FastKV
) -> None:
    """Chunks or not, and propagated tokens alone or all at the TSP layer: which one runs is a question of speed."""
    ids = prompt(310, batch=2)
    expected = tiny_llm.prefill(ids, policy)
    for chunk, narrow in ((64, True), (64, False), (4096, False)):
        monkeypatch.setattr("fastkv.engine.projection.CHUNK", chunk)
        monkeypatch.setattr("fastkv.engine.prefill._propagated_only_pays", lambda *_, narrow=narrow: narrow)
        other = tiny_llm.prefill(ids, policy)
        torch.testing.assert_close(other.logits, expected.logits, atol=1e-4, rtol=1e-4)
        for layer in range(tiny_llm.config.n_layers):
            assert torch.equal(other.kept[layer], expected.kept[layer])
            for found, wanted in zip(other.cache.read(layer), expected.cache.read(layer), strict=True):
                torch.testing.assert_close(found.k, wanted.k, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(found.v, wanted.v, atol=1e-4, rtol=1e-4)


def test_attention_of_some_tokens_is_that_of_all_at_these_tokens() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1300, 8), torch.randn(2, 2, 1300, 8), torch.randn(2, 2, 1300, 8)
    indices = torch.stack([torch.randperm(1300)[:700].sort().values for _ in range(2)])
    index = indices[:, None, :, None].expand(-1, 4, -1, 8)
    for window in (None, 100):
        everything = causal_attention(q, k, v, window)
        some = attend_from(indices, q.gather(2, index), k, v, window)
        torch.testing.assert_close(some, everything.gather(2, index), atol=1e-5, rtol=1e-5)
        last = attend_from(torch.full((2, 1), 1299), q[:, :, -1:], k, v, window)
        torch.testing.assert_close(last, everything[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_what_is_never_read_is_not_computed(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that enter each MLP: all up to the TSP layer, which only propagated ones leave; one in the last."""
    entered: list[int] = []
    forward = MLP.forward

    def count(self: MLP, x: Tensor) -> Tensor:
        entered.append(x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(MLP, "forward", count)
    tiny_llm.prefill(prompt(300), FastKV(tsp_layer=2, tsp_rate=0.3, min_tokens=8))
    assert entered == [300, 300, 90, 90, 90, 1]


def test_full_logits_of_a_long_prompt_are_plain_causal_attention(tiny_llm: LLM) -> None:
    ids = prompt(97)
    with torch.inference_mode():
        slow = slow_prefill(tiny_llm, ids, FastKV(tsp_rate=1.0, kv_retention=1.0))
    torch.testing.assert_close(tiny_llm.prefill(ids, FullKV()).logits, slow.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", [FastKV(tsp_rate=1.0, kv_retention=1.0), FastKV(tsp_len=999, kv_len=999), FastKV()])
def test_a_budget_of_the_whole_prompt_is_the_full_cache(tiny_llm: LLM, policy: FastKV) -> None:
    ids = prompt(120)  # below the floor of the last policy
    full, same = tiny_llm.prefill(ids, FullKV()), tiny_llm.prefill(ids, policy)
    assert torch.equal(full.logits, same.logits)
    assert all(torch.equal(full.cache.read(i)[0].k, same.cache.read(i)[0].k) for i in range(6))
    assert all(torch.equal(a, b) for a, b in zip(full.kept, same.kept, strict=True))


def test_what_each_layer_saw_and_kept(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(prompt(300, batch=2), FastKV(tsp_layer=2, tsp_rate=0.3, kv_retention=0.1, min_tokens=8))
    assert [tuple(tokens.shape) for tokens in pre.tokens] == [(2, 300)] * 3 + [(2, 90)] * 3
    assert [tuple(kept.shape) for kept in pre.kept] == [(2, 2, 30)] * 6
    assert pre.logits.shape == (2, 256)
    assert pre.logits.dtype == torch.float32
    for tokens, kept in zip(pre.tokens, pre.kept, strict=True):
        assert tokens.dtype == kept.dtype == torch.int64
        assert (tokens.diff(dim=-1) > 0).all()
        assert (kept.diff(dim=-1) > 0).all()
        assert (kept[..., -8:] == torch.arange(292, 300)).all()
        for entries, seen in zip(kept, tokens, strict=True):
            assert set(entries.flatten().tolist()) <= set(seen.tolist())


def test_the_two_decisions_are_independent(tiny_llm: LLM) -> None:
    """Changing the KV budget moves no token of TSP; changing TSP moves no entry of the layers up to it."""
    ids = prompt(300)
    base = tiny_llm.prefill(ids, FastKV(tsp_layer=2, tsp_rate=0.3, kv_retention=0.1, min_tokens=8))
    more_kv = tiny_llm.prefill(ids, FastKV(tsp_layer=2, tsp_rate=0.3, kv_retention=0.8, min_tokens=8))
    more_tsp = tiny_llm.prefill(ids, FastKV(tsp_layer=2, tsp_rate=0.6, kv_retention=0.1, min_tokens=8))
    assert all(torch.equal(a, b) for a, b in zip(base.tokens, more_kv.tokens, strict=True))
    assert torch.equal(base.logits, more_kv.logits)  # the prefill itself never reads the compressed cache
    assert all(torch.equal(a, b) for a, b in zip(base.kept[:3], more_tsp.kept[:3], strict=True))
    assert not torch.equal(base.logits, more_tsp.logits)


def test_a_batch_is_each_prompt_alone(tiny_llm: LLM) -> None:
    policy = FastKV(tsp_layer=2, tsp_rate=0.3, kv_retention=0.1, min_tokens=8)
    both = prompt(200, batch=2)
    together = tiny_llm.prefill(both, policy)
    for index in range(2):
        alone = tiny_llm.prefill(both[index].tolist(), policy)
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
        for a, b in zip(together.kept, alone.kept, strict=True):
            assert torch.equal(a[index], b[0])


def test_only_one_layers_full_kv_is_alive_at_a_time(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's full K/V lies in the same place: the sizes of layers x prompt are never there."""
    places: set[int] = set()
    score = FastKV.score

    def noted(self: FastKV, observed: Observation) -> Tensor:
        places.add(observed.k.untyped_storage().data_ptr())
        return score(self, observed)

    monkeypatch.setattr(FastKV, "score", noted)
    tiny_llm.prefill(prompt(200), FastKV(min_tokens=8))
    assert len(places) == 1


@pytest.mark.parametrize("n_tokens", [1, 2, 9, 10, 11, 17])
def test_short_prompts(tiny_llm: LLM, n_tokens: int) -> None:
    """Around and below the observation window of 10 there is little or nothing to score."""
    pre = tiny_llm.prefill(prompt(n_tokens), FastKV(tsp_len=10, kv_len=10))
    assert [kept.shape[-1] for kept in pre.kept] == [min(10, n_tokens)] * 6
    assert pre.tokens[-1].shape[-1] == min(10, n_tokens)
    assert pre.logits.isfinite().all()


def test_attention_matches_itself_in_blocks() -> None:
    """The sliding-window attention works in blocks of queries; the twin is one explicit mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1100, 8), torch.randn(1, 2, 1100, 8), torch.randn(1, 2, 1100, 8)
    place = torch.arange(1100)
    for window in (1, 5, 511, 512, 513, 1099):
        mask = (place <= place[:, None]) & (place > place[:, None] - window)
        slow = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(causal_attention(q, k, v, window), slow, atol=1e-5, rtol=1e-5)
