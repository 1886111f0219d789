"""Window scores and selection against twins written as loops, straight from the method's definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastkv import FastKV, SnapKV
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.policy import Drafted, Observation
from fastkv.cache.scores import forward_pooled
from fastkv.cache.selection import select_entries, select_per_head, select_tokens


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


def some_heads() -> Observation:
    torch.manual_seed(0)
    return Observation(0, torch.randn(1, 4, 60, 8), torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8))


def test_propagated_tokens_may_have_a_reach_of_their_own() -> None:
    observed = some_heads()
    apart, alike = FastKV(reach=2, tsp_reach=9, tsp_window=0), FastKV(reach=9, tsp_window=0)
    scores = apart.score(observed)
    assert torch.equal(scores, FastKV(reach=2).score(observed))
    assert torch.equal(apart.importance(observed, scores, None), alike.score(observed))
    assert torch.equal(alike.importance(observed, alike.score(observed), None), alike.score(observed))


@pytest.mark.parametrize(
    ("count", "n_choosing"),
    [(None, 16), (40, 16), (30, 15), (20, 10), (12, 8)],  # at most half of what is propagated; never below the window
)
def test_propagated_tokens_may_be_chosen_by_more_queries(count: int | None, n_choosing: int) -> None:
    policy, wider = FastKV(window=8, tsp_window=16, reach=3), FastKV(window=n_choosing, tsp_window=0, reach=3)
    observed, alone = some_heads(), some_heads()
    found = policy.importance(observed, policy.score(observed), count)
    expected = wider.importance(alone, wider.score(alone), count)
    assert torch.equal(found[..., : 60 - n_choosing], expected)
    assert (found[..., 60 - n_choosing :] == float("inf")).all(), "a token that chooses might be dropped"
    assert found.shape[-1] == 60 - 8


def test_queries_that_choose_tokens_choose_no_entries() -> None:
    assert torch.equal(FastKV(tsp_window=50).score(some_heads()), FastKV(tsp_window=0).score(some_heads()))


NARROW = FastKV(window=3, tsp_window=0, reach=2, kernel=3, narrow=0.6)


def chosen_by_two(wide: list[float], narrow: list[float], n_wide: int, count: int) -> list[int]:
    """The best tokens by `wide`, then of the others the best by `narrow`, one at a time."""
    by_wide = sorted(range(len(wide)), key=lambda token: -wide[token])[:n_wide]
    others = sorted(set(range(len(wide))) - set(by_wide), key=lambda token: -narrow[token])
    return sorted([*by_wide, *others[: count - n_wide]])


# Of 9 tokens all, of 20 the three passages of a token and its reach of 2 (9), of 57 what is left of 0.6 (34) are wide.
@pytest.mark.parametrize(("count", "n_wide"), [(9, 9), (20, 9), (57, 23)])
def test_a_part_of_every_budget_is_chosen_by_narrow_pooling(count: int, n_wide: int) -> None:
    torch.manual_seed(count)
    heads = torch.randn(1, 2, 100, 4)
    wide, narrow = torch.rand(2, 1, 2, 97)
    observed = Observation(0, heads, heads, heads, noted={"received": wide[:, :, None], "narrow": narrow})
    entries = select_entries(NARROW.ranking(observed, wide, count + 3), count + 3, 3)
    per_head = select_per_head(
        NARROW.ranking(observed, wide, torch.full((1, 2), count + 3)), torch.full((1, 2), count + 3), 3
    )
    assert torch.equal(per_head.index.view(1, 2, -1) % 100, entries)
    for head in range(2):
        expected = chosen_by_two(wide[0, head].tolist(), narrow[0, head].tolist(), n_wide, count)
        assert entries[0, head, :-3].tolist() == expected
    tokens = select_tokens(NARROW.importance(observed, wide, count + 3), count + 3, 3)
    sums = (of[0].double().sum(dim=0).tolist() for of in (wide, narrow))
    assert tokens[0, :-3].tolist() == chosen_by_two(*sums, n_wide, count)


def test_earlier_entries_take_nothing_of_what_new_tokens_are_propagated() -> None:
    torch.manual_seed(1)
    heads = torch.randn(1, 2, 100, 4)
    wide, narrow = torch.rand(2, 1, 2, 97)
    wide[..., :60] += 10
    observed = Observation(0, heads, heads, heads, n_past=60, noted={"narrow": narrow})
    tokens = select_tokens(NARROW.importance(observed, wide, 23), 23, 3)[0, :-3].tolist()
    sums = (of[0, :, 60:].double().sum(dim=0).tolist() for of in (wide, narrow))
    assert tokens == chosen_by_two(*sums, 9, 20)


@pytest.mark.parametrize("policy", [NARROW, FastKV(narrow=0.3, queries="sum", kernel=9)], ids=str)
def test_narrow_scores_are_those_of_max_pooling(policy: FastKV) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(1, 4, 80, 8) * 2, torch.randn(1, 2, 80, 8), torch.randn(1, 2, 80, 8)
    drafted = Drafted(torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.ones(1, 5, dtype=torch.bool))
    for draft in (None, drafted):
        observed = Observation(0, q, k, v, drafted=draft)
        ranked = policy.ranking(observed, policy.score(observed), 60)
        by_max = dataclasses.replace(policy, pooling="max", share=0.0).score(Observation(0, q, k, v, drafted=draft))
        wide = ranked.isinf()
        assert 0 < wide.sum() < wide.numel()
        assert torch.equal(ranked[~wide], by_max[~wide])


@pytest.mark.parametrize(
    "policy", [FastKV(narrow=0.0, tsp_window=0), FastKV(pooling="max", tsp_window=0), FastKV.paper()], ids=str
)
def test_nothing_is_narrow_where_that_is_off(policy: FastKV) -> None:
    heads = torch.randn(1, 2, 100, 4)
    observed, scores = Observation(0, heads, heads, heads), torch.rand(1, 2, 100 - policy.window)
    assert policy.ranking(observed, scores, 40) is scores
    assert torch.equal(policy.importance(observed, scores, 40), scores)


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
