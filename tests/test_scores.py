"""Window scores and selection against a twin written as loops, straight from the method's definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastkv.cache.scores import window_scores
from fastkv.cache.selection import select_entries, select_tokens


def slow_scores(q: Tensor, k: Tensor, window: int, kernel: int, pooling: str) -> Tensor:
    """One head, one query, one token at a time."""
    (batch, heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    scores = torch.zeros(batch, kv_heads, tokens - window)
    for b in range(batch):
        for h in range(heads):
            received = torch.zeros(tokens)
            for query in range(tokens - window, tokens):
                logits = [float(q[b, h, query].double() @ k[b, h // group, j].double()) for j in range(query + 1)]
                weights = torch.tensor(logits, dtype=torch.float64).div(math.sqrt(dim)).softmax(0)
                received[: query + 1] += weights.float()
            received = received[:-window]
            for token in range(tokens - window):
                near = received[max(0, token - kernel // 2) : token + kernel // 2 + 1]
                scores[b, h // group, token] += near.max() if pooling == "max" else near.sum() / kernel
    return scores


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize(("window", "kernel"), [(8, 7), (3, 1), (1, 5), (5, 9)])
def test_scores_match_the_definition(window: int, kernel: int, pooling: str) -> None:
    torch.manual_seed(window * kernel)
    q, k = torch.randn(2, 6, 20, 4) * 2, torch.randn(2, 2, 20, 4)
    fast = window_scores(q, k, window, kernel, pooling)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow_scores(q, k, window, kernel, pooling), atol=1e-5, rtol=1e-5)


def test_scores_are_float32_in_bfloat16_models() -> None:
    """Scores of a half-precision model are computed in float32 from its values: rounding them would make false ties."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 64, 8).bfloat16(), torch.randn(1, 2, 64, 8).bfloat16()
    torch.testing.assert_close(window_scores(q, k, 8, 7, "max"), window_scores(q.float(), k.float(), 8, 7, "max"))


def test_later_queries_of_the_window_do_not_look_ahead() -> None:
    """What comes after a query must not change its scores: all mass on the future token would leave nothing here."""
    q, k = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    k[..., -1, :] = 100  # only the very last query may see the very last key
    scores = window_scores(q, k, 2, 1, "max")
    torch.testing.assert_close(scores, torch.full((1, 1, 2), 1 / 3))


def test_entries_are_the_best_of_each_head_and_the_window() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8], [0.7, 0.1, 0.6, 0.2]]])
    kept = select_entries(scores, count=4, window=2)
    assert kept.tolist() == [[[1, 3, 4, 5], [0, 2, 4, 5]]]


def test_tokens_are_the_best_over_all_heads_and_the_window() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8], [0.7, 0.1, 0.6, 0.2]], [[4.0, 3, 2, 1], [0, 0, 0, 9]]])
    assert select_tokens(scores, count=3, window=1).tolist() == [[1, 3, 4], [0, 3, 4]]


def test_only_the_window_is_kept_when_it_fills_the_budget() -> None:
    assert select_entries(torch.rand(1, 2, 5), count=3, window=3).tolist() == [[[5, 6, 7], [5, 6, 7]]]
