"""The functions that sampling is made of: each treats every sequence by its own setting, and an off one not at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkv.engine.logits_filters import apply_temperature, draw, keep_min_p, keep_top, penalise_repetition

LOGITS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
BATCH = torch.stack((LOGITS, LOGITS.flip(0)))
V = LOGITS.shape[0]
OFF_K, OFF_P = V, 2.0


def top_k(logits: Tensor, *k: int) -> Tensor:
    return keep_top(logits, torch.tensor(k), None)


def top_p(logits: Tensor, *p: float) -> Tensor:
    return keep_top(logits, None, torch.tensor(p, dtype=torch.float64))


def min_p(logits: Tensor, *p: float) -> Tensor:
    highest = logits.amax(dim=-1, keepdim=True)
    return keep_min_p(logits - highest, torch.tensor(p).log())


@pytest.mark.parametrize(("keep", "setting"), [(top_k, 2), (top_p, 0.5), (min_p, 0.5)])
def test_filters_treat_each_sequence_on_its_own(keep: Callable[..., Tensor], setting: float) -> None:
    kept = keep(BATCH, setting, setting) > -math.inf
    assert kept.tolist() == [[True, True, False, False, False], [False, False, False, True, True]]


@pytest.mark.parametrize(("keep", "setting", "off"), [(top_k, 2, OFF_K), (top_p, 0.5, OFF_P), (min_p, 0.5, 0.0)])
def test_a_filter_that_is_off_for_one_sequence_leaves_its_bits(
    keep: Callable[..., Tensor], setting: float, off: float
) -> None:
    """A top_p of 1 dropped unlikely tokens where the sum of the others was rounded up to 1."""
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * 8
    logits -= logits.amax(dim=-1, keepdim=True)
    if keep is top_k and off == OFF_K:
        off = logits.shape[1]
    kept = keep(logits, off, setting)
    assert torch.equal(kept[0], logits[0])
    assert not torch.equal(kept[1], logits[1])


def test_top_k_keeps_equal_logits_at_the_border() -> None:
    assert (top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), 2) > -math.inf).tolist() == [
        [False, True, True, True, False]
    ]


def test_top_p_keeps_no_more_equal_tokens_than_it_needs() -> None:
    """Four equal tokens: half of the probability is two of them, not three; and always the same two."""
    assert (top_p(torch.zeros(1, 4), 0.5) > -math.inf).tolist() == [[True, True, False, False]]


def test_top_p_applies_to_what_top_k_left() -> None:
    """Of the best three, 0.47, 0.35 and 0.18, the first two have 0.8; of all five, they have 0.7."""
    p = torch.tensor([0.8], dtype=torch.float64)
    assert (keep_top(LOGITS[None], torch.tensor([3]), p) > -math.inf).sum() == 2
    assert (keep_top(LOGITS[None], torch.tensor([5]), p) > -math.inf).sum() == 3


@pytest.mark.parametrize("p", [5e-324, 1e-46, 1e-9])
def test_the_best_token_stays_whatever_top_p(p: float) -> None:
    assert (top_p(BATCH, p, p) > -math.inf).tolist() == [[True] + [False] * 4, [False] * 4 + [True]]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]] * 2)
    seen = torch.tensor([[True, True, False, False]] * 2)
    penalised = penalise_repetition(logits, seen, torch.tensor([2.0, 1.0]))
    assert penalised.tolist() == [[1.0, -4.0, 2.0, -2.0], [2.0, -2.0, 2.0, -2.0]]


def test_temperature_divides_and_the_best_is_zero_whatever_it_is() -> None:
    logits = torch.tensor([[3.0, 1.0, -math.inf]] * 3)
    found = apply_temperature(logits, logits.amax(dim=-1), torch.tensor([2.0, 0.0, 1e30]))
    assert found[0].tolist() == [0.0, -1.0, -math.inf]
    assert found[1, 0] == 0
    assert found[1, 1] < -1e29
    assert found[2, 0] == 0
    assert abs(found[2, 1]) < 1e-29
    assert found[2, 2] == -math.inf


# --- draw -------------------------------------------------------------------------------------------------------------

LARGEST = 1 - 2.0**-53  # what a generator of 53 bits can give


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.25, 0.5, LARGEST])
def test_impossible_tokens_are_never_drawn(uniform: float) -> None:
    """At both ends, and between: a number of exactly 0, or a sum rounded to the total, met a token of probability 0."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 40, generator=generator)
    logits[torch.rand(500, 40, generator=generator) < 0.6] = -math.inf
    logits[:, [0, -1]] = -math.inf
    logits[:, 20] = 0.0
    tokens = draw(logits, torch.full((500,), uniform, dtype=torch.float64))
    assert (logits.gather(1, tokens[:, None]) > -math.inf).all()


def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_possible_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -2.0, -math.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, LARGEST], dtype=torch.float64)).tolist() == [1, 3]


@pytest.mark.parametrize("sums", [[0.3, 0.2, 0.5, 0.9], [0.2, 0.3, 0.9, 0.5]], ids=["falling", "last below the total"])
def test_sums_that_rounding_put_out_of_order(monkeypatch: pytest.MonkeyPatch, sums: list[float]) -> None:
    """A parallel sum need not rise at every token; the impossible one (the second) is not drawn for all that."""
    probabilities = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)
    rounded = torch.tensor([sums], dtype=torch.float64)
    monkeypatch.setattr(Tensor, "softmax", lambda *args, **kwargs: probabilities)
    monkeypatch.setattr(Tensor, "cumsum", lambda *args, **kwargs: rounded)
    for uniform in (0.0, 0.22, 0.3, 0.6, LARGEST):
        assert draw(probabilities, torch.tensor([uniform], dtype=torch.float64)).item() != 1


def test_a_draw_inverts_the_distribution_function() -> None:
    """Between two borders it is the token between them: 0.4, 0.7, 0.85, 0.95."""
    uniform = torch.tensor([0.0, 0.399, 0.401, 0.699, 0.701, 0.849, 0.851, 0.949, 0.951, 0.999], dtype=torch.float64)
    assert draw(LOGITS.expand(10, -1), uniform).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("vocab_size", [7, 33, 1001, 4099])
def test_a_draw_is_the_same_bits_alone_and_in_a_batch(vocab_size: int) -> None:
    """At the very border: the number is the share of the first tokens, as this sequence alone adds it up."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, vocab_size, generator=generator) * 3
    sums = torch.cat([one.softmax(-1, dtype=torch.float64).cumsum(-1) for one in logits.split(1)])
    for border in range(0, vocab_size, max(1, vocab_size // 50)):
        uniform = (sums[:, border] / sums[:, -1]).clamp_max(LARGEST)
        alone = torch.cat([draw(logits[i : i + 1].clone(), uniform[i : i + 1]) for i in range(9)])
        assert torch.equal(draw(logits, uniform), alone)
