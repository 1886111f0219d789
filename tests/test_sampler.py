"""Sampling: distributions are counted, and every filter is shown to do something."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import FastKVError, SamplingParams
from fastkv.engine.sampler import Sampler, draw, keep_min_p, keep_top_k, keep_top_p, penalise_repetition

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = PROBABILITIES.log()
DRAWS = 20_000
NO_PROMPT = torch.zeros(1, 0, dtype=torch.int64)


def started(params: SamplingParams, prompt: Tensor = NO_PROMPT, vocab_size: int = 5) -> Sampler:
    sampler = Sampler(params, prompt.shape[0], vocab_size, prompt.device)
    sampler.start(prompt, params.seed)
    return sampler


def shares(logits: Tensor, **settings: Any) -> Tensor:
    """How often each token is drawn: [V]."""
    sampler = started(SamplingParams(seed=1, **settings), vocab_size=len(logits))
    tokens = sampler(logits.expand(DRAWS, -1).contiguous())
    return torch.bincount(tokens, minlength=len(logits)) / DRAWS


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 4.5 standard deviations of a binomial share: a fair sampler fails once in 100 000 draws of a seed."""
    spread = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread + 1e-9).all(), (found, expected)


def test_draws_follow_the_softmax() -> None:
    assert_close(shares(LOGITS, temperature=1.0), PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert (expected - PROBABILITIES).abs().max() > 0.05
    assert_close(shares(LOGITS, temperature=temperature), expected)


def renormalised(keep: list[int]) -> Tensor:
    kept = torch.zeros(5)
    kept[keep] = PROBABILITIES[keep]
    return kept / kept.sum()


@pytest.mark.parametrize(("k", "keep"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k(k: int, keep: list[int]) -> None:
    assert_close(shares(LOGITS, temperature=1.0, top_k=k), renormalised(keep))


@pytest.mark.parametrize(
    ("p", "keep"), [(0.01, [0]), (0.39, [0]), (0.5, [0, 1]), (0.8, [0, 1, 2]), (0.97, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, keep: list[int]) -> None:
    assert_close(shares(LOGITS, temperature=1.0, top_p=p), renormalised(keep))


@pytest.mark.parametrize(("p", "keep"), [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 2, 3]), (0.5, [0, 1]), (1.0, [0])])
def test_min_p_is_relative_to_the_best(p: float, keep: list[int]) -> None:
    assert_close(shares(LOGITS, temperature=1.0, min_p=p), renormalised(keep))


def test_filters_apply_after_the_temperature() -> None:
    """At temperature 3 the flat distribution needs more tokens to reach the same p."""
    flat = (LOGITS / 3).softmax(0)
    expected = torch.zeros(5)
    expected[:3] = flat[:3] / flat[:3].sum()
    assert flat[:2].sum() < 0.55 < flat[:3].sum() < 0.75
    assert_close(shares(LOGITS, temperature=3.0, top_p=0.55), expected)


def test_filters_work_row_by_row() -> None:
    rows = torch.stack((LOGITS, LOGITS.flip(0)))
    for kept in (keep_top_k(rows, 2), keep_top_p(rows, 0.5), keep_min_p(rows, 0.5)):
        assert (kept > -math.inf).tolist() == [[True, True, False, False, False], [False, False, False, True, True]]


@pytest.mark.parametrize("settings", [{"top_p": 1e-46}, {"repetition_penalty": 1e6}, {"min_p": 1.0}, {"top_k": 1}])
def test_extreme_settings_leave_the_best_token(settings: dict[str, float]) -> None:
    """A top_p that float32 rounds to zero dropped every token, and the draw from nothing gave token 0."""
    sampler = started(SamplingParams(temperature=1.0, seed=0, **settings), torch.arange(5)[None])  # type: ignore[arg-type]
    assert [int(sampler(LOGITS.flip(0)[None])) for _ in range(200)] == [4] * 200


def test_equal_logits_at_the_border_of_top_p() -> None:
    """Four equal tokens: half of the probability is two of them, not three."""
    assert (keep_top_p(torch.zeros(1, 4), 0.5) > -math.inf).sum() == 2


def test_temperature_zero_is_greedy_whatever_the_filters() -> None:
    sampler = started(SamplingParams(top_k=3, top_p=0.5, seed=0))
    assert sampler(LOGITS.flip(0)[None]).tolist() == [4]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_repetition_penalty_sees_the_prompt_and_the_text_so_far() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.7]])
    sampler = started(SamplingParams(repetition_penalty=1.5), torch.tensor([[0]]), 4)
    # 0 is in the prompt; each token drawn is penalised from then on; when all are, the order is the old one
    assert [int(sampler(logits)) for _ in range(5)] == [1, 2, 3, 0, 0]


def test_same_seed_same_tokens_and_other_seed_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = started(SamplingParams(temperature=1.0, seed=seed))
        return [int(sampler(LOGITS[None])) for _ in range(50)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    shares(LOGITS, temperature=1.0)
    assert torch.equal(torch.rand(4), expected)


def test_impossible_tokens_are_never_drawn() -> None:
    """A waiting time of zero divided by a probability of zero would be NaN, and NaN wins every argmax."""
    logits = torch.full((2000, 3), -math.inf)
    logits[:, 1] = 0
    assert (draw(logits, torch.Generator().manual_seed(0)) == 1).all()


BAD = [
    ("max_tokens", [0, -1, 1.5, "3", True]),
    ("temperature", [-0.1, math.nan, math.inf, "hot", None]),
    ("top_k", [-1, 1.5, "3"]),
    ("top_p", [0, 0.0, -0.5, 1.01, math.nan, "x"]),
    ("min_p", [-0.1, 1.01, math.nan, "x"]),
    ("repetition_penalty", [0, -1, math.nan, math.inf]),
    ("seed", [-1, 1.5, 2**63, "x"]),
    ("stop", ["", ("a", ""), (1,)]),
]


@pytest.mark.parametrize(("setting", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(FastKVError, match=setting) as caught:
        SamplingParams(**{setting: value})
    assert caught.value.setting == setting


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_a_sampler_starts_anew() -> None:
    """Graphs keep a sampler for many requests: what one text has seen, and its chance, end with it."""
    params = SamplingParams(temperature=1.0, repetition_penalty=3.0, seed=3)
    sampler = started(params, torch.tensor([[1, 2]]))
    first = [int(sampler(LOGITS[None])) for _ in range(20)]
    sampler.start(torch.tensor([[4]]), 9)
    assert [int(sampler(LOGITS[None])) for _ in range(20)] != first
    sampler.start(torch.tensor([[1, 2]]), 3)
    assert [int(sampler(LOGITS[None])) for _ in range(20)] == first
