"""ReST-KV: what leaving out an entry does to the output, against leaving it out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKVError, ReSTKV
from fastkv.cache.policy import Observation
from fastkv.cache.scores import shifted_mean
from fastkv.engine.output_norms import output_norms
from fastkv.models.block import Attention

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))
PLAIN: dict[str, Any] = {"pooling": "avg", "kernel": 1}


@pytest.fixture
def attention(tiny_llm: LLM) -> Attention:
    return tiny_llm._model.blocks[0].self_attn


def observed(attention: Attention, n_tokens: int = 24, batch: int = 1) -> Observation:
    generator = torch.Generator().manual_seed(0)
    head_dim = attention.head_dim
    q = torch.randn(batch, 4, 8, head_dim, generator=generator)
    k, v = torch.randn(2, batch, 2, n_tokens, head_dim, generator=generator)
    return Observation(0, q, k, v, output=partial(output_norms, attention))


@torch.inference_mode()
def test_scores_are_those_of_leaving_one_out(attention: Attention) -> None:
    """Of the last query alone: attention without a key, and the output projection of what that changes."""
    seen = observed(attention)
    scores = ReSTKV(window=1, alpha=1.0, **PLAIN).score(seen)
    expected = torch.zeros(2, 23)
    for head in range(4):
        k, v = seen.k[0, head // 2], seen.v[0, head // 2]
        logits = k @ seen.q[0, head, -1] / attention.head_dim**0.5
        output = logits.softmax(0) @ v
        weight = attention.o_proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim]
        for token in range(23):
            rest = [other for other in range(24) if other != token]
            without = logits[rest].softmax(0) @ v[rest]
            expected[head // 2, token] += torch.linalg.vector_norm(weight @ (output - without))
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_group_is_the_sum_of_its_query_heads(attention: Attention) -> None:
    """As if each query head had keys and values of its own."""
    seen = observed(attention, batch=2)
    alone = replace(seen, k=seen.k.repeat_interleave(2, 1), v=seen.v.repeat_interleave(2, 1))
    expected = ReSTKV(**PLAIN).score(alone).unflatten(1, (2, 2)).sum(dim=2)
    torch.testing.assert_close(ReSTKV(**PLAIN).score(seen), expected)


@torch.inference_mode()
def test_values_that_are_all_alike_are_worth_nothing(attention: Attention) -> None:
    seen = observed(attention)
    alike = replace(seen, v=seen.v[:, :, :1].expand_as(seen.v))
    assert float(ReSTKV(**PLAIN).score(alike).abs().max()) < 1e-5 * float(ReSTKV(**PLAIN).score(seen).max())


@torch.inference_mode()
def test_the_later_a_query_the_more_it_weighs(attention: Attention) -> None:
    seen = observed(attention)
    last = ReSTKV(window=8, alpha=1.0, **PLAIN).score(seen)
    other = replace(seen, q=torch.cat((seen.q[:, :, :-1].flip(1), seen.q[:, :, -1:]), dim=2))
    assert torch.equal(ReSTKV(window=8, alpha=1.0, **PLAIN).score(other), last)
    rows = torch.rand(1, 1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    slow = rows[..., 0, :]
    for row in (1, 2):
        slow = 0.3 * rows[..., row, :] + 0.7 * slow
    torch.testing.assert_close(ReSTKV()._mean(rows), slow)


@torch.inference_mode()
def test_the_size_of_the_output_projection_does_not_matter(attention: Attention) -> None:
    seen = observed(attention)
    double = replace(seen, output=lambda x, norm: 2 * output_norms(attention, x, norm))
    torch.testing.assert_close(ReSTKV().score(double), 2 * ReSTKV().score(seen))


@torch.inference_mode()
def test_tokens_are_taken_some_at_a_time(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observed(attention, batch=2)
    expected = ReSTKV().score(seen)
    monkeypatch.setattr("fastkv.cache.policies.restkv._TOKENS_AT_A_TIME", 5)
    torch.testing.assert_close(ReSTKV().score(seen), expected)


def slow_mean(scores: list[float], width: int, shift: int) -> list[float]:
    """One token at a time."""
    last = len(scores) - 1
    near = range(-(width // 2), width // 2 + 1)
    return [
        sum(scores[min(max(token - shift + step, 0), last)] for step in near) / width for token in range(len(scores))
    ]


def test_each_sequence_has_its_width_and_shift() -> None:
    scores = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0))
    found = shifted_mean(scores, [5, 3, 7], [0, 2, -4])
    for row, (width, shift) in enumerate(((5, 0), (3, 2), (7, -4))):
        for head in range(2):
            expected = slow_mean(scores[row, head].tolist(), width, shift)
            torch.testing.assert_close(found[row, head], torch.tensor(expected))


def test_drift_is_how_far_the_window_moves_on() -> None:
    """In one prompt from token 10 to 7000, in the other one back by 3000."""
    seen = Observation(0, *[torch.empty(0)] * 3)
    attention = torch.zeros(2, 1, 1, 4, 9000)
    attention[0, ..., :2, 10], attention[0, ..., 2:, 7000] = 1, 1
    attention[1, ..., :2, 5000], attention[1, ..., 2:, 2000] = 1, 1
    assert ReSTKV(kv_len=9)._drifts(seen, attention) == [6990, -3000]
    assert ReSTKV(kv_len=8)._drifts(seen, attention) == [0, 0]  # nothing but the window is kept
    assert ReSTKV(kv_len=9)._drifts(seen, attention[..., :1, :]) == [0, 0]


def test_a_drift_of_thousands_widens_and_shifts(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], list[int]]] = []

    def watch(scores: Tensor, widths: list[int], shifts: list[int]) -> Tensor:
        asked.append((widths, shifts))
        return scores

    monkeypatch.setattr("fastkv.cache.scores.shifted_mean", watch)
    for drifts in ([500.0, -1999.0], [6990.0, -4000.0]):
        monkeypatch.setattr(ReSTKV, "_drifts", lambda self, observed, attention, drifts=drifts: drifts)
        with torch.inference_mode():
            ReSTKV().score(observed(attention, batch=2))
    assert asked == [([5, 5], [0, 0]), ([7, 5], [3, -2])]


def test_what_restkv_settles_is_refused() -> None:
    for settings in ({"values": True}, {"queries": "max"}, {"alpha": 0.0}, {"pooling": "mean"}):
        with pytest.raises(FastKVError) as caught:
            ReSTKV(**settings)
        assert caught.value.setting == next(iter(settings))


def test_sinks_stay(tiny_llm: LLM) -> None:
    for pooling in ("adaptive", "forward"):
        pre = tiny_llm.prefill(PROMPT, ReSTKV(kv_len=12, sinks=2, pooling=pooling))
        assert all(kept[0, :, :2].tolist() == [[0, 1], [0, 1]] for kept in pre.kept)
