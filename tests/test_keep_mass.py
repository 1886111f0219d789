"""Scores that say how many entries a layer keeps (keep_mass), and attention that does (dbudget)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_policies import POLICIES, counts
from torch import Tensor

from fastkv import CLAA, LLM, DBudgetKV, FastKV, FastKVError, FullKV, KeyDiff, PyramidKV, SamplingParams, SnapKV
from fastkv.cache.keep_mass import norm_counts, smallest, smallest_of_each
from fastkv.cache.policies.read_few import ReadFew
from fastkv.cache.policies.scored import Scored
from fastkv.cache.policy import Drafted, Observation, Policy, plan_layers
from fastkv.cache.scores import window_attention
from fastkv.cache.setting import settings_of
from fastkv.console.summary import figures, warning
from fastkv.engine.prefill import Prefill

N_TOKENS, LEAST = 200, 20
PROMPT = torch.randint(3, 256, (1, N_TOKENS), generator=torch.Generator().manual_seed(4))
BY_MASS = [name for name, policy in POLICIES.items() if "keep_mass" in settings_of(policy)]


def made(name: str, **settings: Any) -> Scored:
    policy = POLICIES[name](**{"keep_mass": 0.7, "min_tokens": LEAST, **settings})
    assert isinstance(policy, Scored)
    return policy


def total(pre: Prefill) -> int:
    return sum(int(counts(kept).sum()) for kept in pre.kept)


# --- the search ---


def test_the_smallest_number_that_is_enough() -> None:
    for wanted in (0, 3, 4, 7, 12, 13, 99):
        assert smallest(lambda count, wanted=wanted: count >= wanted, 3, 13) == min(max(wanted, 3), 13)  # type: ignore[misc]
    assert smallest(lambda count: False, 5, 5) == 5
    wanted = torch.tensor([[0.0, 3.0, 4.0, 7.0], [12.0, 13.0, 14.0, 99.0]])
    found = smallest_of_each(lambda tried: tried.float(), wanted, 3, 13)
    assert found.tolist() == [[3, 3, 4, 7], [12, 13, 13, 13]]
    assert found.dtype == torch.int64


# --- every policy whose scores may decide ---


def test_all_scored_policies_but_those_with_other_budgets_can() -> None:
    left_out = {"full", "headkv", "defensivekv-layer", "streamingllm", "kvzip", "gemfilter", "pyramidinfer", "dbudget"}
    assert set(POLICIES) - set(BY_MASS) == left_out


@pytest.mark.parametrize("name", BY_MASS)
def test_the_whole_mass_is_the_full_cache(tiny_llm: LLM, name: str) -> None:
    same = tiny_llm.prefill(
        PROMPT, made(name, keep_mass=1, **({"tsp_rate": 1.0} if hasattr(made(name), "tsp_rate") else {}))
    )
    full = tiny_llm.prefill(PROMPT, FullKV())
    assert torch.equal(full.logits, same.logits)
    assert all(torch.equal(a, b) for a, b in zip(full.kept, same.kept, strict=True))


class Watched:
    """Of each layer of a prefill what its policy saw and counted: (observed, scores, least, most, counts)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[tuple[Observation, Tensor, int, int, Tensor | int]] = []
        plain = Scored.counts

        def watch(policy: Scored, observed: Observation, n: int, scores: Tensor, least: int, most: int) -> Tensor | int:
            found = plain(policy, observed, n, scores, least, most)
            kept = {name: getattr(observed, name).clone() for name in ("q", "k", "v")}
            self.layers.append((dataclasses.replace(observed, **kept), scores, least, most, found))
            return found

        monkeypatch.setattr(Scored, "counts", watch)


@pytest.mark.parametrize("by", ["layer", "head"])
@pytest.mark.parametrize("name", BY_MASS)
def test_what_is_kept_holds_the_mass_and_one_less_does_not(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, name: str, by: str
) -> None:
    """Counted here from the positions that are kept; the fewest and the most bound it."""
    if by == "head" and (made(name).heads_compete or isinstance(made(name), ReadFew)):
        with pytest.raises(FastKVError, match="leave keep_mass_by at layer"):
            made(name, keep_mass_by=by)
        return
    policy, watched = made(name, keep_mass_by=by, keep_mass_most=0.8), Watched(monkeypatch)
    pre = tiny_llm.prefill(PROMPT, policy, max_tokens=3)
    assert len(watched.layers) >= 5  # the pyramid's last layer has room for the fewest only
    strict = 0
    for observed, scores, least, most, _ in watched.layers:
        layer = observed.layer
        mass, tokens, kept = policy.mass(observed, scores)[0], pre.tokens[layer][0], pre.kept[layer][0]
        assert mass.shape == (2, len(tokens))
        assert (mass >= 0).all()
        here = [torch.isin(tokens, of_head[of_head >= 0]) for of_head in kept]
        held = torch.stack([(of_head * inside).sum() for of_head, inside in zip(mass, here, strict=True)])
        wanted, numbers = policy.keep_mass * mass.sum(dim=1), counts(pre.kept[layer])[0]  # type: ignore[operator]
        if policy.heads_compete:
            held, wanted, mean = held.sum()[None], wanted.sum()[None], int(numbers.sum()) // 2
            numbers = torch.tensor([mean])
        elif by == "layer":
            assert len(set(numbers.tolist())) == 1
        assert ((numbers >= least) & (numbers <= most)).all()
        assert ((held >= wanted * 0.9999) | (numbers == most)).all()
        strict += int(((numbers > least) & (numbers < most)).sum())
        # The weakest of what is kept is needed, where more entries never hold less.
        if name in ("snapkv", "h2o", "keydiff", "expected-attention", "compactor") and by == "head":
            ranking = policy.ranking(observed, scores, numbers[None])[0]
            for head, inside in enumerate(here):
                before = inside[: ranking.shape[1]]
                lowest = ranking[head].masked_fill(~before, float("inf"))
                weakest = int((lowest == lowest.min()).nonzero()[-1])  # of equal scores the first win
                assert held[head] - mass[head, weakest] < wanted[head] * 1.0001 or numbers[head] == least
    assert strict or name in ("adakv", "restkv")  # the number was found somewhere, not only bounded
    assert [len(of) for of in pre.kept] == [1] * 6
    assert torch.equal(pre.cache.lengths[:, 0], torch.stack([counts(kept)[0] for kept in pre.kept]))


@pytest.mark.parametrize(("name", "by"), [*((name, "layer") for name in BY_MASS), ("fastkv", "head"), ("tova", "head")])
def test_decoding_in_a_batch_is_as_alone_and_figures_are_the_caches(tiny_llm: LLM, name: str, by: str) -> None:
    policy = made(name, keep_mass_by=by)
    prompts = [PROMPT[0, :count].tolist() for count in (200, 21)]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    alone = [tiny_llm.generate(prompt, params, policy) for prompt in prompts]
    together = tiny_llm.generate(prompts, params, policy, batch_size=2)
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    held = tiny_llm.prefill(PROMPT, policy)
    metrics = alone[0].metrics
    assert metrics.layer_entries == held.cache.layer_entries == tuple(int(counts(kept).sum()) for kept in held.kept)
    assert metrics.kv_entries == held.cache.entries == sum(metrics.layer_entries)
    assert 12 * LEAST <= metrics.kv_entries < metrics.kv_full_entries
    assert metrics.kv_bytes >= 0.99 * metrics.kv_full_bytes or name in ("pyramidkv",) or hasattr(policy, "tsp_rate")


@pytest.mark.parametrize("name", ["fastkv", "adakv", "keydiff"])
def test_prompts_of_one_tensor(tiny_llm: LLM, name: str) -> None:
    """Heads that keep as many as each needs do so by themselves; where all keep equally many, the neediest decides."""
    ids = torch.randint(3, 256, (3, N_TOKENS), generator=torch.Generator().manual_seed(5))
    for by in ("layer", "head"):
        if by == "head" and made(name).heads_compete:
            continue
        policy = made(name, keep_mass_by=by)
        together, alone = tiny_llm.prefill(ids, policy), [tiny_llm.prefill(prompt[None], policy) for prompt in ids]
        for layer in range(6):
            found = counts(together.kept[layer])
            each = torch.cat([counts(pre.kept[layer]) for pre in alone])
            if by == "head":
                assert torch.equal(found, each)
            elif not policy.heads_compete:
                assert torch.equal(found, each.max().expand(3, 2))
        steps = torch.full((3,), 9)
        logits = tiny_llm.decode(together.cache, steps)
        if by == "head":
            expected = torch.cat([tiny_llm.decode(pre.cache, steps[:1]) for pre in alone])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# --- what they decide ---


@pytest.mark.parametrize("policy", [SnapKV(min_tokens=20), FastKV(min_tokens=20), KeyDiff(min_tokens=20)])
def test_more_mass_is_more_entries_within_the_bounds(tiny_llm: LLM, policy: Policy) -> None:
    found = [
        total(tiny_llm.prefill(PROMPT, dataclasses.replace(policy, keep_mass=share)))  # type: ignore[call-arg]
        for share in (0.01, 0.3, 0.6, 0.9, 0.99, 1.0)
    ]
    assert found == sorted(found)
    assert found[0] == 12 * 20
    assert len(set(found)) > 3
    capped = dataclasses.replace(policy, keep_mass=0.99, keep_mass_most=0.15)  # type: ignore[call-arg]
    pre = tiny_llm.prefill(PROMPT, capped, max_tokens=2)
    assert total(pre) == 12 * 30
    assert pre.cache.nbytes == 2 * 6 * 32 * 2 * tiny_llm.config.head_dim * 4  # memory is there for the most, no more


def test_the_mass_of_a_window_bounds_the_change_of_its_output() -> None:
    """|o - o'| <= 2 d max |v| for each query, d being the share of its attention that is dropped."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 60, 8, generator=generator) for heads in (2, 1, 1))
    policy = SnapKV(window=4, keep_mass=0.8, min_tokens=4)
    observed = Observation(0, 3 * q[:, :, -4:], k, v)
    scores = policy.score(observed)
    count = policy.counts(observed, 1, scores, 4, 60)
    assert isinstance(count, int)
    assert 4 < count < 60
    attention = window_attention(observed.q, k, 4)[0, 0]  # [G, W, T]
    torch.testing.assert_close(policy.mass(observed, scores).sum(), torch.tensor(8.0))
    kept = torch.zeros(60, dtype=torch.bool)
    kept[scores[0, 0].topk(count - 4).indices] = True
    kept[-4:] = True
    rest = attention * kept
    dropped = 1 - rest.sum(-1)
    assert dropped.mean() <= 0.2 + 1e-5
    change = ((rest / rest.sum(-1, keepdim=True) - attention) @ v[0, 0]).norm(dim=-1)
    assert (change <= 2 * dropped * v.norm(dim=-1).max() + 1e-5).all()


def test_full_layers_and_pyramids_keep_their_own_bounds(tiny_llm: LLM) -> None:
    claa = tiny_llm.prefill(PROMPT, CLAA(keep_mass=0.5, min_tokens=20, full_layers=2))
    assert [counts(kept).max() for kept in claa.kept[:2]] == [200, 200]
    plans = plan_layers(PyramidKV(keep_mass=0.5, keep_mass_most=0.5, min_tokens=10), 6, 200)
    assert [plan.kept for plan in plans] == [plan.kept for plan in plan_layers(PyramidKV(kv_len=100), 6, 200)]
    assert {plan.least for plan in plans} == {10}


def test_a_sequence_goes_on_by_mass(tiny_llm: LLM) -> None:
    """Kept entries and new tokens together hold the share; with a number for each head the new ones are kept whole."""
    for by, whole in (("layer", False), ("head", True)):
        policy = made("snapkv", keep_mass_by=by)
        cache = tiny_llm.prefill(PROMPT, policy, 50).cache
        before = cache.entries
        after = tiny_llm.prefill(PROMPT[:, :60], policy, 4, cache=cache)
        assert (cache.entries == before + 12 * 60) is whole
        assert torch.equal(after.cache.lengths, torch.stack([counts(kept) for kept in after.kept]))
        tiny_llm.decode(cache, torch.tensor([7]))


def test_a_lookahead_counts_what_the_draft_attends_to(tiny_llm: LLM) -> None:
    """Of a sequence that has drafted nothing, the window's attention."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 2, 40, 8, generator=generator)
    drafted = Drafted(q[:, :, :3], k[:, :, :3], torch.tensor([[True, True, False], [False] * 3]))
    policy = SnapKV(keep_mass=0.5, lookahead=3)
    plain, ahead = (Observation(0, q, k, k, drafted=of) for of in (None, drafted))
    mass = policy.mass(ahead, policy.score(ahead))
    torch.testing.assert_close(mass[0], drafted.attention(k).sum(dim=(2, 3))[0])
    torch.testing.assert_close(mass[1], policy.mass(plain, policy.score(plain))[1])
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for by in ("layer", "head"):
        out = tiny_llm.generate(PROMPT[0].tolist(), params, made("snapkv", keep_mass_by=by, lookahead=4))
        assert 12 * LEAST < out.metrics.kv_entries < out.metrics.kv_full_entries


def test_tova_keeps_the_same_in_all_heads(tiny_llm: LLM) -> None:
    for kept in tiny_llm.prefill(PROMPT, made("tova", keep_mass_by="head")).kept:
        assert torch.equal(kept[:, 0], kept[:, 1])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("snapkv", {"keep_mass": 0}, "keep_mass must be a number above 0 and at most 1, not 0"),
        ("snapkv", {"keep_mass": 0.9, "kv_len": 50}, "kv_len does not go with keep_mass; leave it out"),
        ("snapkv", {"keep_mass_by": "head"}, "keep_mass_by is for keep_mass; set that, or leave it out"),
        ("snapkv", {"keep_mass_most": 0.5}, "keep_mass_most is for keep_mass; set that, or leave it out"),
        ("keydiff", {"keep_mass": 0.9, "budgets": "model"}, "keep_mass is for layers that do not compete"),
        ("keydiff", {"keep_mass": 0.9, "budgets": "heads", "keep_mass_by": "head"}, "the heads of keydiff compete"),
        ("kvzip", {"keep_mass": 0.9}, "keep_mass is no setting of kvzip; leave it at None"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(FastKVError) as caught:
        POLICIES[name](**settings)
    assert str(caught.value).startswith(said)
    assert caught.value.setting in settings


def test_the_summary_says_what_was_kept(tiny_llm: LLM) -> None:
    params, ids = SamplingParams(max_tokens=2), PROMPT[0].tolist()
    out = tiny_llm.generate(ids, params, made("snapkv", keep_mass=0.6))
    shares = [100 * of / 400 for of in out.metrics.layer_entries]
    assert dict(figures(out))["layers"] == f"keep {min(shares):.1f} % to {max(shares):.1f} % of their entries"
    assert "layers" not in dict(figures(tiny_llm.generate(ids, params, SnapKV(kv_len=20))))
    low = dataclasses.replace(out.metrics, attention_kept=0.5)
    assert str(warning(out.run, low)).endswith("raise --keep-mass")
    found = tiny_llm.generate(ids, params, DBudgetKV(drop_norm=0.5, min_tokens=8))
    assert "to 100.0 % of their entries" in dict(figures(found))["layers"]
    assert str(warning(found.run, low)).endswith("lower --drop-norm")


# --- dbudget ---


def test_the_norm_of_a_row_says_how_many() -> None:
    """Uniform attention: the smallest i with 1 - sqrt(i / T) < 0.01, which is 0.9801 T; all on one token: its place."""
    rows = torch.full((1, 3, 9_999), 1e-4)
    rows[0, 1] = 0
    rows[0, 1, 2] = 1.0
    rows[0, 2] = 0
    rows[0, 2, 9_990] = 1.0
    assert norm_counts(rows, 4, 0.01).tolist() == [[9801, 3, 13]]
    random = torch.rand(1, 2, 50, generator=torch.Generator().manual_seed(0)) ** 8
    order = torch.cat((random[..., :4], random[..., 4:].flip(-1)), dim=-1)
    for drop in (0.01, 0.1, 0.5):
        for head, found in enumerate(norm_counts(random, 4, drop)[0].tolist()):
            lengths = [order[0, head, :i].norm() / order[0, head].norm() for i in range(51)]
            assert 1 - lengths[found] < drop <= 1 - lengths[found - 1]


def test_attention_to_the_first_tokens_need_not_count() -> None:
    """With nearly all of it on the first token nothing else counts; without, the far one does. All on it: nothing."""
    rows = torch.full((1, 3, 1000), 1e-4)
    rows[0, :, 0] = 0.9
    rows[0, 1, 500] = 0.05
    rows[0, 2, 4:] = 0
    assert norm_counts(rows, 4, 0.01)[0].tolist() == [1, 1, 1]
    uniform, far, nothing = norm_counts(rows, 4, 0.01, 4)[0].tolist()
    assert (uniform, far) == (4 + -(-9801 * 996 // 10000), 4 + 500)
    assert nothing == 1
    assert rows[0, 0, 0] == 0.9  # as it was
    assert norm_counts(rows[:, 1:], 4, 0.0, 4)[0].tolist() == [1001, 1001]  # nothing may be dropped: all, of any row


def test_dbudget_keeps_the_first_and_the_latest_and_reports_it(tiny_llm: LLM) -> None:
    totals = []
    for drop in (0.0, 0.01, 0.1, 0.3, 1.0):
        pre = tiny_llm.prefill(PROMPT, DBudgetKV(drop_norm=drop, min_tokens=8))
        totals.append(total(pre))
        assert [counts(kept).tolist() for kept in pre.kept[:2]] == [[[200, 200]]] * 2
        for heads in pre.kept:
            for kept in heads[0]:
                n = int((kept >= 0).sum())
                assert kept[:n].tolist() == [*range(4), *range(204 - n, 200)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 12 * 200
    assert totals[-1] == 4 * 200 + 8 * 8  # the fewest
    assert len(set(totals)) == 5
    capped = tiny_llm.prefill(PROMPT, DBudgetKV(drop_norm=0.0, min_tokens=8, keep_mass_most=0.25))
    assert total(capped) == 4 * 200 + 8 * 50


def test_dbudget_reads_the_last_row_of_each_head(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Observation] = []
    plain = DBudgetKV.counts

    def watch(policy: DBudgetKV, observed: Observation, *sizes: Any) -> Tensor:
        seen.append(dataclasses.replace(observed, q=observed.q.clone(), k=observed.k.clone()))
        return plain(policy, observed, *sizes)

    monkeypatch.setattr(DBudgetKV, "counts", watch)
    pre = tiny_llm.prefill(PROMPT, DBudgetKV(drop_norm=0.1, min_tokens=8))
    assert [observed.layer for observed in seen] == [2, 3, 4, 5]
    for observed in seen:
        row = window_attention(observed.q, observed.k, 1)[0, :, :, 0].sum(dim=1)
        expected = norm_counts(row[None], 4, 0.1, 4).clamp(8, 200)
        assert torch.equal(counts(pre.kept[observed.layer]), expected)
