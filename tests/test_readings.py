"""ASL as its authors' code reads the paper, and StructKV's pivot where attention narrows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastkv import ASL, LLM, FastKVError, SnapKV, StructKV
from fastkv.cache.policies.asl import union_variance
from fastkv.cache.policies.online import OnlineTSP
from fastkv.cache.policies.structkv import figures_of
from fastkv.cache.selection import select_tokens

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))


def layer_of(policy: OnlineTSP, layers: Sequence[Tensor]) -> int:
    """The layer after which tokens are dropped, given the scores of one layer after the other."""
    selector = policy.online_selector(len(layers), layers[0].shape[-1] + policy.window)
    assert selector is not None
    return next(layer for layer, scores in enumerate(layers) if selector(layer, scores) is not None)


def shuffled(seed: int, n: int = 500) -> Tensor:
    """Scores [1, 2, n] in random order."""
    return torch.rand(1, 2, n, generator=torch.Generator().manual_seed(seed))


# --- ASL ---


def coded(**settings: object) -> ASL:
    return ASL(**{"reading": "code", "lookback": 3, "first_layer": 4, "tsp_len": 58, **settings})  # type: ignore[arg-type]


def test_fixed_ranks_settle_one_layer_after_the_first_that_is_judged() -> None:
    assert layer_of(coded(), [shuffled(0)] * 12) == 5
    assert layer_of(coded(first_layer=0), [shuffled(0)] * 12) == 3  # three layers are there at layer 2
    assert layer_of(ASL(reading="code", first_layer=0, tsp_len=58), [shuffled(0)] * 12) == 8


def test_random_ranks_drop_nothing(tiny_llm: LLM) -> None:
    assert layer_of(coded(), [shuffled(seed) for seed in range(12)]) == 11
    pre = tiny_llm.prefill(PROMPT, coded(first_layer=1, lookback=2, tau=1e-9, kv_len=40))
    plain = tiny_llm.prefill(PROMPT, SnapKV(kv_len=40))
    assert pre.layer_tokens == [300] * 6
    assert torch.equal(pre.logits, plain.logits)


def test_ranks_that_have_settled_against_the_first_judged_layer() -> None:
    """Random up to layer 5, then always the same: three layers of that are there at layer 8."""
    layers = [shuffled(seed) for seed in range(6)] + [shuffled(6)] * 6
    assert layer_of(coded(tau=1e-6), layers) == 8
    scaled = [scores * 10.0 ** (layer - 5) for layer, scores in enumerate(layers)]
    assert layer_of(coded(tau=1e-6), scaled) == 8


def test_the_variance_is_that_of_all_tokens_that_any_layer_would_propagate() -> None:
    by_layer = [torch.tensor([[0.0, 1, 2, 3, 4]]), torch.tensor([[1.0, 0, 2, 4, 3]]), torch.tensor([[2.0, 0, 1, 4, 3]])]
    # among the first two of any layer: tokens 0, 1 and 2; population variances 2/3, 2/9, 2/9
    torch.testing.assert_close(union_variance(by_layer, 2), torch.tensor([(2 / 3 + 2 / 9 + 2 / 9) / 3]))
    swapped = [of_layer[:, [0, 1, 2, 4, 3]] for of_layer in by_layer[:1]] + by_layer[1:]
    assert torch.equal(union_variance(swapped, 2), union_variance(by_layer, 2))


def test_prompts_of_one_tensor_settle_together() -> None:
    steady, restless = [shuffled(0)] * 12, [shuffled(seed) for seed in range(8)] + [shuffled(8)] * 4
    both = [torch.cat(pair) for pair in zip(steady, restless, strict=True)]
    assert layer_of(coded(), steady) == 5
    assert layer_of(coded(tau=1e-6), both) == layer_of(coded(tau=1e-6), restless) == 10


def test_the_defaults_of_either_reading() -> None:
    assert ASL(reading="code").layers_of(32) == (10, 31)
    assert ASL().layers_of(32) == (10, 30)
    assert (ASL().settings(32)["lookback"], ASL(reading="code").settings(32)["lookback"]) == (3, 8)
    with pytest.raises(FastKVError, match="reading must be one of paper, code"):
        ASL(reading="other")


# --- StructKV ---


def test_the_share_of_the_best_takes_the_place_of_sparsity() -> None:
    importance = torch.tensor([[4.0, 1, 1, 1, 1]])
    assert figures_of(importance, 1)[0, 1] == pytest.approx(0.5)
    assert figures_of(importance, 5)[0, 1] == pytest.approx(1.0)
    assert figures_of(importance, 9)[0, 1] == pytest.approx(1.0)
    assert torch.equal(figures_of(importance, 1)[:, ::2], figures_of(importance)[:, ::2])


def test_a_rise_is_found_and_a_fall_is_not() -> None:
    """Attention that widens changes most at layer 3; it narrows at layer 6."""
    wide, narrow = torch.ones(1, 2, 100), torch.ones(1, 2, 100)
    narrow[..., 7] = 500
    between = torch.ones(1, 2, 100)
    between[..., 7] = 50
    layers = [narrow, narrow, narrow, wide, wide, wide, between, between, between, between]
    settings = {"first_layer": 1, "tsp_layer": 9, "tsp_len": 28}
    assert layer_of(StructKV(**settings), layers) == 4
    assert layer_of(StructKV(pivot="rise", **settings), layers) == 7
    falls = [narrow, narrow, between, between, wide, wide, wide, wide]
    assert layer_of(StructKV(pivot="rise", first_layer=1, tsp_layer=7, tsp_len=28), falls) == 7  # the latest


def test_without_the_layers_before_it_is_the_pivots_own_scores(tiny_llm: LLM) -> None:
    seen: list[Tensor] = []
    score = StructKV.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructKV, "score", lambda self, observed: seen.append(score(self, observed)) or seen[-1])
        settings = {"first_layer": 2, "tsp_layer": 2, "tsp_len": 60, "kv_len": 40}
        pre = tiny_llm.prefill(PROMPT, StructKV(score_decay=0.0, pivot="rise", **settings))  # type: ignore[arg-type]
    assert torch.equal(pre.tokens[3], select_tokens(seen[2], 60, 8))


def test_the_scores_stay_as_they_are_and_the_direction_is_weighed() -> None:
    selector = StructKV(pivot="rise", tsp_len=9).online_selector(8, 16)
    even, single = torch.ones(1, 2, 8), torch.eye(8)[0].expand(1, 2, -1)
    selector(0, even)
    rise = 0.2 * 1 + 0.3 * 7 / 8 + 0.5 * (7 / 8) ** 0.5
    assert selector._change(single) == pytest.approx(rise, abs=1e-5)
    assert selector._change(even) == pytest.approx(-rise, abs=1e-5)
    assert (even == 1).all()
