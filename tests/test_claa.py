"""FastKV's relatives: CLAA, which lets several layers choose, and FastKV with AdaKV's budgets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import CLAA, LLM, AdaKV, FastKV, FastKVAda, FastKVError, FastKVPaper, SamplingParams
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.policy import Observation, OnlineSelector
from fastkv.cache.selection import select_tokens
from fastkv.engine.prefill import Prefill

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))
SCORED = ("window", "queries", "pooling", "reach", "values", "sinks", "share")


def same(one: Prefill, other: Prefill) -> bool:
    kept = all(torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
    return kept and one.layer_tokens == other.layer_tokens and torch.allclose(one.logits, other.logits, atol=1e-5)


def selected(policy: CLAA, layers: list[Tensor]) -> Tensor:
    """The importance that the selector gives at the TSP layer, and None before."""
    selector: OnlineSelector | None = policy.online_selector(len(layers) + 1, 500)
    assert selector is not None
    found = [selector(layer, scores) for layer, scores in enumerate(layers[: policy.tsp_layer_of(99) + 1])]
    assert all(importance is None for importance in found[:-1])
    assert found[-1] is not None
    return found[-1]


# --- CLAA ---


def test_one_layer_and_one_head_are_fastkv(tiny_llm: LLM) -> None:
    """With several heads the highest counts and not the sum, so that only a model of one KV head can show it."""
    config: dict[str, Any] = {"tsp_layer": 2, "tsp_len": 60, "kv_len": 40}
    with pytest.MonkeyPatch.context() as patch:
        score = WindowScored.received

        def of_one_head(self: WindowScored, observed: Observation) -> Tensor:
            received = score(self, observed)
            return received * torch.tensor([1.0, 0.0])[:, None, None]

        patch.setattr(WindowScored, "received", of_one_head)
        ours = tiny_llm.prefill(PROMPT, CLAA(lookback=1, **config))
        assert same(ours, tiny_llm.prefill(PROMPT, FastKVPaper(pooling="avg", **config)))
        assert ours.layer_tokens == [300] * 3 + [60] * 3


def test_the_best_of_heads_and_layers_counts() -> None:
    layers = list(torch.rand(6, 1, 2, 40, generator=torch.Generator().manual_seed(0)))
    found = selected(CLAA(tsp_layer=4, lookback=3), layers)
    expected = torch.stack(layers[2:5]).amax(dim=(0, 2))
    assert torch.equal(found, expected.unsqueeze(1))
    assert torch.equal(selected(CLAA(tsp_layer=1, lookback=9), layers), torch.stack(layers[:2]).amax(dim=(0, 2))[None])


def test_more_layers_never_lower_a_score_and_their_order_does_not_matter() -> None:
    layers = list(torch.rand(6, 2, 2, 40, generator=torch.Generator().manual_seed(1)))
    found = [selected(CLAA(tsp_layer=5, lookback=count), layers) for count in range(1, 7)]
    assert all((more >= less).all() for less, more in itertools.pairwise(found))
    for order in itertools.permutations(range(3)):
        swapped = layers[:3] + [layers[3 + place] for place in order]
        assert torch.equal(selected(CLAA(tsp_layer=5, lookback=3), swapped), found[2])


@pytest.mark.parametrize("kv_retention", [0.1, 1.0])
def test_claa_propagates_by_its_own_scores(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, kv_retention: float) -> None:
    """In the engine, whatever is kept: layers that keep all of their entries score all the same."""
    seen: list[Tensor] = []
    score = CLAA.score
    monkeypatch.setattr(CLAA, "score", lambda self, observed: seen.append(score(self, observed)) or seen[-1])
    pre = tiny_llm.prefill(PROMPT, CLAA(tsp_layer=3, lookback=2, tsp_len=60, kv_retention=kv_retention))
    importance = torch.stack(seen[2:4]).amax(dim=(0, 2))
    assert torch.equal(pre.tokens[4], select_tokens(importance.unsqueeze(1), 60, 8))
    assert pre.layer_tokens == [300] * 4 + [60] * 2


def test_requests_do_not_see_each_other(tiny_llm: LLM) -> None:
    policy = CLAA(tsp_len=60, kv_len=40)
    before = tiny_llm.prefill(PROMPT, policy)
    tiny_llm.prefill(PROMPT.flip(1), policy)
    assert same(tiny_llm.prefill(PROMPT, policy), before)
    batch = tiny_llm.prefill(torch.cat((PROMPT, PROMPT.flip(1))), policy)
    assert all(torch.equal(kept[:1], alone) for kept, alone in zip(batch.kept, before.kept, strict=True))


def test_the_first_layers_may_keep_everything(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(PROMPT, CLAA(tsp_layer=3, tsp_len=60, kv_len=40, full_layers=2))
    assert [kept.shape[2] for kept in pre.kept] == [300, 300, 40, 40, 40, 40]


def test_claa_takes_one_tsp_layer() -> None:
    for settings in ({"tsp_layer": (2, 4)}, {"tsp_rate": (0.5, 0.2)}, {"lookback": 0}, {"full_layers": -1}):
        with pytest.raises(FastKVError) as caught:
            CLAA(**settings)
        assert caught.value.setting == next(iter(settings))
    with pytest.raises(FastKVError, match="tsp_layer must be below"):
        CLAA(tsp_layer=6).validate(6)


# --- FastKV with AdaKV's budgets ---


def test_without_tsp_it_is_adakv(tiny_llm: LLM) -> None:
    ours = tiny_llm.prefill(PROMPT, FastKVAda(tsp_rate=1.0, kv_len=40))
    scores = {name: getattr(FastKV(), name) for name in SCORED}
    assert same(ours, tiny_llm.prefill(PROMPT, AdaKV(kv_len=40, **scores)))


def test_with_nothing_to_compete_for_it_is_fastkv(tiny_llm: LLM) -> None:
    """Up to ties, which average pooling does not make."""
    config: dict[str, Any] = {"kv_len": 40, "tsp_len": 60, "pooling": "avg", "sinks": 0}
    assert same(
        tiny_llm.prefill(PROMPT, FastKVAda(head_floor=1.0, **config)), tiny_llm.prefill(PROMPT, FastKV(**config))
    )


def test_heads_share_what_the_layer_keeps_after_the_tsp_layer_too(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(PROMPT, FastKVAda(tsp_layer=2, tsp_len=60, kv_len=40, head_floor=0.0, share=0.0))
    counts = [(kept >= 0).sum(dim=2)[0] for kept in pre.kept]
    assert [int(of_layer.sum()) for of_layer in counts] == [80] * 6
    assert any(of_layer[0] != of_layer[1] for of_layer in counts[3:]), "no head has more than another"
    assert all(int(of_layer.max()) <= 60 for of_layer in counts[3:])
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    out = tiny_llm.generate(PROMPT[0].tolist(), params, FastKVAda(tsp_layer=2, tsp_len=30, kv_len=40))
    assert out.metrics.kv_entries == 2 * (3 * 40 + 3 * 30)


@pytest.mark.parametrize("n_tokens", [20, 24, 50, 200])
def test_at_most_half_of_the_propagated_tokens_choose(tiny_llm: LLM, n_tokens: int) -> None:
    """What the selector chooses from has room for tokens before those that choose, in short prompts, too."""
    policy = CLAA(tsp_window=100, tsp_len=18, kv_len=16)
    propagated = tiny_llm.prefill(PROMPT[:, :n_tokens], policy, 2).tokens[-1][0].tolist()
    assert len(propagated) == min(18, n_tokens)
    assert propagated[-9:] == list(range(n_tokens - 9, n_tokens))
    assert propagated[0] < n_tokens - 18 or n_tokens < 40
