"""Window scores and selection against twins written as loops, straight from the method's definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastkv import FastKV, SnapKV
from fastkv.cache.policies.compressed import WindowScored
from fastkv.cache.policy import Observation
from fastkv.cache.scores import forward_pooled
from fastkv.cache.selection import select_entries, select_tokens


def slow_scores(q: Tensor, k: Tensor, v: Tensor, policy: WindowScored) -> Tensor:
    """One head, one query, one token at a time."""
    (batch, heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    group, before = heads // kv_heads, tokens - policy.window
    scores = torch.zeros(batch, kv_heads, before)
    for b in range(batch):
        for h in range(heads):
            rows = []
            for query in range(before, tokens):
                logits = [float(q[b, h, query].double() @ k[b, h // group, j].double()) for j in range(query + 1)]
                weights = torch.tensor(logits, dtype=torch.float64).div(math.sqrt(dim)).softmax(0).tolist()
                rows.append(weights + [0.0] * (tokens - len(weights)))
            combine = sum if policy.queries == "sum" else max
            received = [combine(row[token] for row in rows) for token in range(before)]
            if policy.values:
                received = [x * float(v[b, h // group, token].norm()) for token, x in enumerate(received)]
            received[: policy.sinks] = [0.0] * len(received[: policy.sinks])
            for token in range(before):
                scores[b, h // group, token] += pooled(received, token, policy)
        strongest = scores[b].max(dim=0).values
        scores[b] += policy.share * strongest
    scores[..., : policy.sinks] = float("inf")
    return scores


def pooled(received: list[float], token: int, policy: WindowScored) -> float:
    if policy.pooling == "forward":
        return max(received[max(0, token - policy.reach) : token + 1])
    half = policy.kernel // 2
    near = received[max(0, token - half) : token + half + 1]
    return max(near) if policy.pooling == "max" else sum(near) / policy.kernel


@pytest.mark.parametrize(
    "policy",
    [
        *(SnapKV(window=w, kernel=n, pooling=p) for w, n in [(8, 7), (3, 1), (1, 5), (5, 9)] for p in ("max", "avg")),
        FastKV(reach=4),
        FastKV(window=3, sinks=2, share=0.3, reach=2),
        FastKV(window=5, queries="sum", values=False, share=0.0, reach=0),
        FastKV.paper(share=2.0, values=True),
    ],
    ids=str,
)
def test_scores_match_the_definition(policy: WindowScored) -> None:
    torch.manual_seed(policy.window)
    q, k, v = torch.randn(2, 6, 20, 4) * 2, torch.randn(2, 2, 20, 4), torch.randn(2, 2, 20, 4)
    fast, slow = policy.score(Observation(0, q, k, v)), slow_scores(q, k, v, policy)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast[..., policy.sinks :], slow[..., policy.sinks :], atol=1e-5, rtol=1e-5)
    assert (fast[..., : policy.sinks] > fast[..., policy.sinks :].max()).all(), "a sink may be dropped"


def test_a_score_lifts_the_tokens_after_it_and_none_before() -> None:
    scores = torch.zeros(2, 3, 12)
    scores[0, 1, 4] = 1.0
    scores[1, 2, 11] = 1.0
    assert forward_pooled(scores, 3)[0, 1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert forward_pooled(scores, 3).sum() == 4 + 1, "a score has left its own head, or the tokens"
    assert torch.equal(forward_pooled(scores, 0), scores)


def test_propagated_tokens_may_have_a_reach_of_their_own() -> None:
    torch.manual_seed(0)
    observed = Observation(0, torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    apart, alike = FastKV(reach=2, tsp_reach=9), FastKV(reach=9)
    scores = apart.score(observed)
    assert torch.equal(scores, FastKV(reach=2).score(observed))
    assert torch.equal(apart.importance(observed, scores), alike.score(observed))
    assert alike.importance(observed, scores) is scores


def test_scores_are_float32_in_bfloat16_models() -> None:
    """Scores of a half-precision model are computed in float32 from its values: rounding them would make false ties."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 64, 8).bfloat16(), torch.randn(1, 2, 64, 8).bfloat16()
    half, single = (FastKV().score(Observation(0, *heads)) for heads in ((q, k, k), (q.float(), k.float(), k.float())))
    torch.testing.assert_close(half, single)


def test_later_queries_of_the_window_do_not_look_ahead() -> None:
    """What comes after a query must not change its scores: all mass on the future token would leave nothing here."""
    q, k = torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    k[..., -1, :] = 100  # only the very last query may see the very last key
    scores = SnapKV(window=2, kernel=1).score(Observation(0, q, k, k))
    torch.testing.assert_close(scores, torch.full((1, 1, 2), 1 / 3))


def test_what_is_observed_stays_as_it_is() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    kept = [x.clone() for x in (q, k, v)]
    for policy in (FastKV(), FastKV.paper(sinks=3, share=1.0)):
        policy.score(Observation(0, q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v), strict=True))


def test_entries_are_the_best_of_each_head_and_the_window() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8], [0.7, 0.1, 0.6, 0.2]]])
    kept = select_entries(scores, count=4, window=2)
    assert kept.tolist() == [[[1, 3, 4, 5], [0, 2, 4, 5]]]


def test_tokens_are_the_best_over_all_heads_and_the_window() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8], [0.7, 0.1, 0.6, 0.2]], [[4.0, 3, 2, 1], [0, 0, 0, 9]]])
    assert select_tokens(scores, count=3, window=1).tolist() == [[1, 3, 4], [0, 3, 4]]


def test_only_the_window_is_kept_when_it_fills_the_budget() -> None:
    assert select_entries(torch.rand(1, 2, 5), count=3, window=3).tolist() == [[[5, 6, 7], [5, 6, 7]]]
