"""Keep all, read few: what an index knows of the keys, what it chooses, and steps that read no more than that."""

from __future__ import annotations

import dataclasses
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_one_layer
from torch import Tensor

from fastkv import LLM, AdaKV, ClusterKV, FastKVError, FullKV, Policy, Quest, RocketKV, SamplingParams, SinkRouter
from fastkv.cache import clusters
from fastkv.cache.clusters import Clusters
from fastkv.cache.first_key import FirstKey
from fastkv.cache.pages import Pages
from fastkv.cache.policies.rocketkv import kept_share, pages_of
from fastkv.cache.pool import bucket
from fastkv.cache.reader import Index, IndexSizes, wanted
from fastkv.engine import few_reads
from fastkv.engine.compiled_row import CompiledRow
from fastkv.engine.few_reads import of_heads
from fastkv.engine.footprint import footprint
from fastkv.engine.plan import plan_request

CPU = torch.device("cpu")
HEADS, GROUP, DIM = 2, 3, 8
PROMPT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()
POLICIES: dict[str, Policy] = {
    "quest": Quest(read_len=64),
    "clusterkv": ClusterKV(read_len=64, per_cluster=8),
    "rocketkv": RocketKV(read_len=64),
    "rocketkv, some channels": RocketKV(read_len=40, kv_len=250, dense_layers=1),
    "sinkrouter": SinkRouter(tau=0.3, dense_layers=1),
    "quest with TSP": Quest(read_len=64, tsp_rate=0.6, min_tokens=8),
    "quest of few": Quest(read_len=64, kv_len=200),
}
ONE_OF_EACH = pytest.mark.parametrize(
    "policy", [POLICIES[name] for name in ("quest", "clusterkv", "rocketkv, some channels", "sinkrouter")]
)
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def sizes(n_entries: int, room: int = 100, budget: int = 32) -> IndexSizes:
    return IndexSizes(1, HEADS, DIM, torch.float32, n_entries, n_entries + room, budget)


def keys_and_queries(n_entries: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [1, Hkv, n, D], queries [1, Hkv, G, D], and their products, [1, Hkv, G, n]."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(1, HEADS, n_entries, DIM, generator=generator)
    q = torch.randn(1, HEADS, GROUP, DIM, generator=generator)
    return k, q, q @ k.transpose(2, 3)


def shares(products: Tensor) -> Tensor:
    """What the queries of a group attend to, summed: [1, Hkv, n]."""
    return (products * DIM**-0.5).softmax(dim=3).sum(dim=2)


def learnt(index: Index, k: Tensor, first: int) -> Index:
    """The index after `first` keys at once, then one after the other."""
    for n_entries in range(first, k.shape[2] + 1):
        if index.due(n_entries):
            index.learn(k[:, :, :n_entries])
    return index


# --- pages ---


@pytest.mark.parametrize("channels", [None, DIM])
def test_no_key_of_a_page_is_above_its_bound(channels: int | None) -> None:
    k, q, products = keys_and_queries(67)
    pages = Pages(sizes(67), CPU, 8)
    pages._channels = channels
    pages.learn(k)
    if channels is not None:  # of the sum of the queries
        products, q = products.sum(dim=2, keepdim=True), q.sum(dim=2, keepdim=True)
    bounds, highest = pages.bounds(q), products[..., :64].unflatten(3, (8, 8)).amax(dim=4)
    assert bounds.shape == (1, HEADS, q.shape[2], 8)
    assert (bounds >= highest - 1e-5).all()
    of_pages = k[:, :, :64].unflatten(2, (8, 8)).unsqueeze(2)  # the best of each channel
    rows = q.unsqueeze(3)
    best = torch.maximum(rows * of_pages.amax(4), rows * of_pages.amin(4)).sum(dim=4)
    torch.testing.assert_close(bounds, best, atol=1e-5, rtol=1e-5)


def test_some_channels_are_those_where_the_query_is_largest() -> None:
    k, q, _ = keys_and_queries(65)
    few, whole = Pages(sizes(65), CPU, 8, channels=3), Pages(sizes(65), CPU, 8, channels=DIM)
    whole._channels = DIM
    silent = torch.zeros_like(q)
    silent[..., [1, 4, 6]] = q[..., [1, 4, 6]]
    for pages in (few, whole):
        pages.learn(k)
    torch.testing.assert_close(few.bounds(silent), whole.bounds(silent))
    assert few.read_bytes == 8 * 3 * HEADS * 4
    assert whole.read_bytes == 8 * DIM * HEADS * 4


def test_pages_of_one_entry_are_the_best_entries() -> None:
    k, q, products = keys_and_queries(50)
    pages = learnt(Pages(sizes(50), CPU, 1), k, 50)
    chosen = pages.choose(q, 50, 20)
    assert chosen is not None
    expected = torch.cat((shares(products[..., :49]).topk(19).indices, torch.full((1, HEADS, 1), 49)), dim=2)
    assert torch.equal(chosen.sort().values, expected.sort().values)


@pytest.mark.parametrize("page", [1, 3, 8])
def test_pages_learnt_one_by_one_are_those_learnt_at_once(page: int) -> None:
    """Also after some were forgotten, and others came in their place."""
    k, _, _ = keys_and_queries(60)
    other, _, _ = keys_and_queries(60, seed=1)
    slow = learnt(Pages(sizes(30), CPU, page), torch.cat((k[:, :, :40], other[:, :, 40:]), dim=2), 30)
    slow.forget(40)
    learnt(slow, k, 41)
    at_once = Pages(sizes(30), CPU, page)
    at_once.learn(k)
    known = (60 - 1) // page
    assert torch.equal(slow.extremes[..., :known], at_once.extremes[..., :known])  # type: ignore[attr-defined]
    assert at_once.nbytes == Pages.bytes_of(sizes(30), page)


@pytest.mark.parametrize("n_entries", [33, 39, 40])
def test_the_newest_page_is_always_read_whole_or_not(n_entries: int) -> None:
    k, q, _ = keys_and_queries(n_entries)
    pages = learnt(Pages(sizes(n_entries), CPU, 8), k, n_entries)
    chosen = pages.choose(q, n_entries, 25)
    assert chosen is not None
    assert chosen.shape[2] == 2 * 8 + n_entries - 32
    for head in chosen[0].tolist():
        assert len(set(head)) == len(head)
        assert set(range(32, n_entries)) <= set(head)
        others = {entry // 8 for entry in head if entry < 32}
        assert sorted(head) == sorted([*(8 * page + i for page in others for i in range(8)), *range(32, n_entries)])
    assert pages.choose(q, n_entries, 40) is None
    assert [Quest(read_len=5, page=8).read_budget(n_tokens) for n_tokens in (20, 99)] == [20, 24]  # three at least


def test_a_loud_query_has_no_more_to_say_than_another() -> None:
    """Scaled up, it would alone decide by a sum; and small shares keep their order."""
    products = torch.tensor([[10.0, 0, 0, 0], [0, 0, 1, 0]]).view(1, 1, 2, 4)
    loud = products * torch.tensor([1000.0, 1]).view(2, 1)
    order = [each.argsort(descending=True)[0, 0].tolist() for each in (wanted(products, 1), wanted(loud, 1))]
    assert order[0][:2] == order[1][:2] == [0, 2]
    far = torch.tensor([[0.0, -300, -200, -400], [0, -300, -200, -400]]).view(1, 1, 2, 4)
    assert wanted(far, 1).argsort(descending=True)[0, 0].tolist() == [0, 2, 1, 3]
    torch.testing.assert_close(wanted(products, 4).float(), (products / 2).softmax(3).sum(2))
    assert torch.equal(wanted(products[:, :, :1], 4), products[:, :, 0])


# --- clusters ---


def clusters_of(index: Any) -> list[list[list[int]]]:
    """Of each head the entries of each cluster."""
    return [
        [order[start : start + count] for start, count in zip(starts, counts, strict=True)]
        for order, starts, counts in zip(
            index.order[0].tolist(),
            index.starts[0, :, : index._n_clusters].tolist(),
            index.counts[0, :, : index._n_clusters].tolist(),
            strict=True,
        )
    ]


def test_clusters_are_a_partition() -> None:
    """Of all but the sinks and those that wait, of which a block is clustered by itself."""
    k, _, _ = keys_and_queries(300)
    index: Any = learnt(Clusters(sizes(200, budget=100), CPU, 16, per_cluster=10), k, 200)
    assert index._known == 199 + 2 * 42  # (100 - 16) // 2 wait at most
    assert index._n_clusters == 183 // 10 + 2 * (42 // 10)
    for head in clusters_of(index):
        assert sorted(entry for cluster in head for entry in cluster) == list(range(16, index._known))
    means = index.means[0, 0, : index._n_clusters]
    expected = torch.stack([k[0, 0, cluster].mean(0) if cluster else means[0] * 0 for cluster in clusters_of(index)[0]])
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=1e-5)
    assert index.nbytes == Clusters.bytes_of(sizes(200, budget=100), 16, 10)


@pytest.mark.parametrize(("n_keys", "per_cluster"), [(99, 10), (150, 10), (399, 10), (210, 150), (340, 90)])
def test_long_prompts_are_clustered_stretch_by_stretch(
    monkeypatch: pytest.MonkeyPatch, n_keys: int, per_cluster: int
) -> None:
    """Neighbours alone share a cluster, in stretches of 50 to 99 (or of a cluster's tokens); none is left out."""
    monkeypatch.setattr(clusters, "STRETCH", 50)
    k, _, _ = keys_and_queries(n_keys + 5)
    own = sizes(n_keys + 5, budget=20)
    index: Any = learnt(Clusters(own, CPU, 4, per_cluster=per_cluster), k, n_keys + 5)
    stretches = max(1, n_keys // max(50, per_cluster))
    bounds = [4 + n_keys * place // stretches for place in range(stretches + 1)]
    assert index._n_clusters == sum(max(1, (b - a) // per_cluster) for a, b in pairwise(bounds))
    for head in clusters_of(index):
        assert sorted(entry for cluster in head for entry in cluster) == list(range(4, n_keys + 4))
        for cluster in filter(None, head):
            assert len({sum(entry >= bound for bound in bounds) for entry in cluster}) == 1
    assert index.nbytes == Clusters.bytes_of(own, 4, per_cluster)


def test_keys_that_are_near_each_other_are_one_cluster() -> None:
    """Beside what all have in common, which is much more here. Those of one direction are not, if lengths differ."""
    directions, common = torch.eye(DIM)[[0, 1, 2, 2]] * torch.tensor([[1.0], [1], [1], [3]]), 100 * torch.ones(DIM)
    ways = [(i + i // 10) % 4 for i in range(41)]
    k = torch.stack([directions[way] + common for way in ways]).expand(1, HEADS, -1, -1)
    index: Any = Clusters(sizes(41), CPU, 0, per_cluster=10)
    index.learn(k)
    assert {tuple(ways[entry] for entry in cluster) for cluster in clusters_of(index)[0]} == {
        (i,) * 10 for i in range(4)
    }
    torch.testing.assert_close(index.means[0, 0, 0], k[0, 0, clusters_of(index)[0][0][0]], atol=1e-3, rtol=0)


@pytest.mark.parametrize("n_entries", [200, 201, 240, 300])
@pytest.mark.parametrize("budget", [18, 50, 133])
def test_the_budget_of_clusters_is_exact_and_the_last_one_is_cut(n_entries: int, budget: int) -> None:
    k, q, _ = keys_and_queries(n_entries)
    index: Any = learnt(Clusters(sizes(200, budget=budget), CPU, 16, per_cluster=10), k, 200)
    chosen = index.choose(q, n_entries, budget)
    assert chosen.shape == (1, HEADS, budget)
    for head, found in enumerate(clusters_of(index)):
        read = set(chosen[0, head].tolist())
        assert len(read) == budget
        assert {*range(16), *range(index._known, n_entries)} <= read
        cut = [cluster for cluster in found if 0 < len(read & set(cluster)) < len(cluster)]
        assert len(cut) <= 1
        scores = shares(q @ index.means[:, :, : index._n_clusters].transpose(2, 3))[0, head].tolist()
        whole = [i for i, cluster in enumerate(found) if cluster and read >= set(cluster)]
        skipped = [i for i, cluster in enumerate(found) if cluster and not read & set(cluster)]
        assert not whole or not skipped or min(scores[i] for i in whole) >= max(scores[i] for i in skipped) - 1e-5


def test_clusters_of_one_key_are_the_best_keys() -> None:
    k, q, products = keys_and_queries(60)
    index = learnt(Clusters(sizes(60), CPU, 0, per_cluster=1), k, 60)
    chosen = index.choose(q, 60, 20)
    assert chosen is not None
    assert torch.equal(chosen[..., :19], shares(products[..., :59]).topk(19).indices)
    assert (chosen[..., 19] == 59).all()


def test_what_was_clustered_and_then_forgotten_is_clustered_anew() -> None:
    k, q, _ = keys_and_queries(120)
    other, _, _ = keys_and_queries(120, seed=1)
    mixed = torch.cat((k[:, :, :80], other[:, :, 80:]), dim=2)
    index = learnt(Clusters(sizes(100), CPU, 4, per_cluster=5), mixed, 100)
    index.forget(80)
    learnt(index, k, 120)
    fresh = learnt(Clusters(sizes(100), CPU, 4, per_cluster=5), k, 120)
    chosen, expected = index.choose(q, 120, 40), fresh.choose(q, 120, 40)
    assert chosen is not None
    assert expected is not None
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize(("per_cluster", "budget"), [(16, 78), (40, 174), (80, 174), (5, 30), (1, 20), (500, 90)])
def test_there_is_room_for_the_clusters_of_any_answer(per_cluster: int, budget: int) -> None:
    """Entry by entry to the end, now and then some forgotten: what is clustered is no more than memory is there for."""
    k, q, _ = keys_and_queries(700)
    own = sizes(300, room=400, budget=budget)
    index: Any = Clusters(own, CPU, 16, per_cluster=per_cluster)
    n_entries, step = 300, 0
    while n_entries <= 700:
        if index.due(n_entries):
            index.learn(k[:, :, :n_entries])
        for head in clusters_of(index):
            assert sum(map(len, head)) == index._known - 16
        if step % 7 == 6:
            index.forget(n_entries - 5)
            n_entries -= 5
        n_entries, step = n_entries + 1, step + 1
    assert index.choose(q, 700, budget).shape == (1, HEADS, budget)
    assert index.nbytes == Clusters.bytes_of(own, 16, per_cluster)


def test_what_is_forgotten_leaves_the_clusters_before_it() -> None:
    k, _, _ = keys_and_queries(300)
    index: Any = learnt(Clusters(sizes(200, budget=50), CPU, 16, per_cluster=10), k, 200)
    ends = list(index._ends)
    assert len(ends) > 3
    index.forget(ends[1][0] + 1)
    assert index._ends == ends[:2]
    index.forget(ends[0][0] - 1)
    assert (index._ends, index._known, index._n_clusters) == ([], 0, 0)


def test_clusters_without_keys_have_no_share() -> None:
    """Keys that repeat leave some empty, and all products with the others are below the 0 of an empty one's mean."""
    distinct = torch.randn(1, HEADS, 10, DIM, generator=torch.Generator().manual_seed(3))
    k = torch.cat((distinct.repeat(1, 1, 20, 1), distinct[:, :, :1]), dim=2)
    base, noise = torch.randn(2, 1, HEADS, GROUP, DIM, generator=torch.Generator().manual_seed(4))
    q = base[:, :, :1] + 0.1 * noise
    k = k - 5 * base[:, :, :1]
    index: Any = learnt(Clusters(sizes(201), CPU, 0, per_cluster=5), k, 201)
    chosen = index.choose(q, 201, 41)
    assert (q @ k.transpose(2, 3) < 0).all()
    for head, found in enumerate(clusters_of(index)):
        real = [cluster for cluster in found if cluster]
        assert len(real) < len(found)
        means = torch.stack([k[0, head, cluster].mean(dim=0) for cluster in real])
        best = int((q[0, head] @ means.T * DIM**-0.5).softmax(dim=1).sum(dim=0).argmax())
        assert set(chosen[0, head, : len(real[best])].tolist()) == set(real[best])


# --- the first key ---


def test_a_head_is_skipped_where_its_whole_group_looks_at_the_first_key() -> None:
    k = torch.randn(1, HEADS, 9, DIM, generator=torch.Generator().manual_seed(0))
    q = k[:, :, :1].expand(-1, -1, GROUP, -1).clone() * 3
    index = FirstKey(sizes(9), CPU, 0.9)
    index.learn(k)
    assert torch.equal(index.choose(q, 9, 9), torch.zeros(1, HEADS, dtype=torch.bool))  # type: ignore[arg-type]
    q[0, 1, 2] = -k[0, 1, 0]  # one query of the group looks elsewhere
    assert index.choose(q, 9, 9).tolist() == [[False, True]]  # type: ignore[union-attr]
    never = FirstKey(sizes(9), CPU, 1.01)
    never.learn(k)
    assert never.choose(q, 9, 9) is None


def test_what_a_skipped_head_loses_is_bounded(tiny_llm: LLM) -> None:
    """The others are as they were. A skipped head gives 0, which is off by what it would have given."""
    k, q, _ = keys_and_queries(20)
    v = torch.randn(1, HEADS, 20, DIM, generator=torch.Generator().manual_seed(5))
    weights = (q @ k.transpose(2, 3) / DIM**0.5).softmax(-1)  # [1, Hkv, G, n]
    whole = (weights @ v).flatten(1, 2).unsqueeze(2)
    part = few_reads.Part(k, v)
    found = of_heads([part], q.flatten(1, 2).unsqueeze(2), torch.tensor([[False, True]]))
    assert not found[:, :GROUP].any()
    torch.testing.assert_close(found[:, GROUP:], whole[:, GROUP:], atol=1e-5, rtol=1e-5)
    lengths, a = v[0, 0].norm(dim=1), weights[0, 0, :, 0]
    assert (whole[0, :GROUP, 0].norm(dim=1) <= a * lengths[0] + (1 - a) * lengths[1:].max() + 1e-6).all()


# --- RocketKV's sizes ---


def test_what_rocketkv_keeps_and_looks_up() -> None:
    assert kept_share(1) == 1
    assert kept_share(10) == pytest.approx(10 ** -(0.2 + 0.06 * 3.3219281))
    assert kept_share(2**20) == pytest.approx(2 ** (-20 * 0.8))
    assert RocketKV().budget(0, 4, 10_000) == 3_987
    assert RocketKV(kv_retention=0.2).budget(0, 4, 10_000) == 2_000
    assert RocketKV(read_len=300).budget(0, 4, 300) == 300  # reads everything, keeps everything
    for n_entries, page, channels in ((32, 1, 8), (40, 1, 6), (128, 2, 4), (288, 3, 3), (3200, 10, 1)):
        assert pages_of(sizes(n_entries)) == (page, channels)


# --- steps ---


@EACH_POLICY
def test_a_step_attends_to_what_was_chosen_and_to_nothing_else(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    """Each layer of each step against dense attention under a mask; the bytes that were counted, too."""
    call, choose = few_reads._ChosenAttention.__call__, few_reads.Reader.choose
    found: list[Tensor | None] = []
    entries = [0]

    def watched(self: Any, *arguments: Any) -> Tensor | None:
        found.append(choose(self, *arguments))
        return found[-1]

    def checked(self: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended, chosen = call(self, layer, q, k, v), found[-1]
        (part,) = self._pool.layers[layer].read(self._slots, 1)
        n_entries = part.k.shape[2]
        visible = torch.ones(1, 2, n_entries, dtype=torch.bool)
        if chosen is not None:
            wide = chosen.dtype == torch.bool
            visible = chosen.unsqueeze(2) & visible if wide else torch.zeros_like(visible).scatter_(2, chosen, True)
        entries[0] += int(visible.sum())
        logits = q.unflatten(1, (2, -1)) @ part.k.unsqueeze(2).transpose(3, 4) / q.shape[3] ** 0.5
        weights = logits.masked_fill(~visible[:, :, None, None], float("-inf")).softmax(-1).nan_to_num(0)
        expected = (weights @ part.v.unsqueeze(2)).flatten(1, 2)
        torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-4)
        return attended

    monkeypatch.setattr(few_reads.Reader, "choose", watched)
    monkeypatch.setattr(few_reads._ChosenAttention, "__call__", checked)
    metrics = tiny_llm.generate(PROMPT, params(10), policy).metrics
    assert len(found) == 9 * 6
    few = sum(chosen is not None for chosen in found)
    assert few == 9 * (6 - policy.dense_layers) or policy.name in ("sinkrouter", "quest with TSP")  # type: ignore[attr-defined]
    assert few
    kv_bytes = entries[0] * 2 * tiny_llm.config.head_dim * 4
    assert metrics.read_bytes is not None
    assert kv_bytes / 9 <= metrics.read_bytes <= 2.2 * kv_bytes / 9


@pytest.mark.parametrize(
    "policy", [Quest(read_len=999), ClusterKV(read_retention=1), RocketKV(read_retention=1), SinkRouter(tau=1.1)]
)
def test_where_everything_is_read_there_is_no_index(tiny_llm: LLM, policy: Policy) -> None:
    full, same = (tiny_llm.generate(PROMPT, params(20), each) for each in (FullKV(), policy))
    assert same.token_ids == full.token_ids
    assert same.metrics.kv_bytes == full.metrics.kv_bytes
    config = tiny_llm.config
    entry = 2 * config.head_dim * 4
    assert full.metrics.read_bytes == same.metrics.read_bytes == 6 * config.n_kv_heads * (300 + 10) * entry
    assert tiny_llm.prefill(PROMPT, policy).cache.reader is None


def test_what_a_step_reads_by_hand(tiny_llm: LLM) -> None:
    """Quest, four pages of 16 of 300 entries in four of six layers; the newest one has 13, then 14."""
    config = tiny_llm.config
    entry = 2 * config.head_dim * 4
    metrics = tiny_llm.generate(PROMPT, params(3), Quest(read_len=64)).metrics
    in_full, few = 2 * (301 + 302) / 2, 4 * (48 + 13.5)
    extremes = 4 * 18 * 2 * config.head_dim * 4
    assert metrics.read_bytes == config.n_kv_heads * ((in_full + few) * entry + extremes)
    held = 4 * config.n_kv_heads * 19 * 2 * config.head_dim * 4
    assert metrics.kv_bytes - tiny_llm.generate(PROMPT, params(3), FullKV()).metrics.kv_bytes == held


@ONE_OF_EACH
def test_each_row_of_a_batch_is_the_prompt_alone(tiny_llm: LLM, policy: Policy) -> None:
    """Among them one too short to have an index; then two prompts of one tensor."""
    prompts = [PROMPT, PROMPT[:40], PROMPT[::-1], PROMPT[50:260]]
    alone = [tiny_llm.generate(prompt, params(6), policy).token_ids for prompt in prompts]
    together = tiny_llm.generate(prompts, params(6), policy, batch_size=3)
    assert [output.token_ids for output in together] == alone
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    both, single = tiny_llm.prefill(ids, policy), [tiny_llm.prefill(row[None], policy) for row in ids]
    for token in (9, 77):
        expected = torch.cat([tiny_llm.decode(pre.cache, torch.tensor([token])) for pre in single])
        found = tiny_llm.decode(both.cache, torch.tensor([token, token]))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@ONE_OF_EACH
def test_what_is_forgotten_is_as_if_it_had_never_been(tiny_llm: LLM, policy: Policy) -> None:
    straight, back = (tiny_llm.prefill(PROMPT, policy).cache for _ in range(2))
    for token in range(40, 60):
        tiny_llm.decode(back, torch.tensor([token]))
    back.truncate(20)
    for token in range(90, 110):
        expected = tiny_llm.decode(straight, torch.tensor([token]))
        if not isinstance(policy, ClusterKV):  # whose blocks of new keys begin elsewhere
            torch.testing.assert_close(tiny_llm.decode(back, torch.tensor([token])), expected, atol=1e-4, rtol=1e-4)


def test_several_tokens_at_once_read_everything(tiny_llm: LLM) -> None:
    quest, full = (tiny_llm.prefill(PROMPT, each).cache for each in (Quest(read_len=64), FullKV()))
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(tiny_llm.decode(quest, tokens), tiny_llm.decode(full, tokens))
    one = tokens[:, 0]
    assert not torch.allclose(tiny_llm.decode(quest, one), tiny_llm.decode(full, one), atol=1e-4)


@EACH_POLICY
def test_the_index_is_as_large_as_planned(tiny_llm: LLM, policy: Policy) -> None:
    """And belongs to the cache; a footprint knows of it, and of the memory that a step gathers in."""
    plan = plan_request(tiny_llm.config, policy, 300, 40, torch.float32, 1000)
    cache = tiny_llm.prefill(PROMPT, policy, max_tokens=40).cache
    assert cache.reader is not None
    assert cache.reader.nbytes == plan.index_nbytes > 0
    assert cache.nbytes == plan.nbytes + plan.index_nbytes
    for _ in range(40):
        tiny_llm.decode(cache, torch.tensor([7]))
    gathered = 0 if cache.reader._rows is None else cache.reader._rows.nbytes
    without = dataclasses.replace(plan, policy=SinkRouter(tau=2))
    said, less = (footprint(tiny_llm.model, each, each.nbytes) for each in (plan, without))
    assert said.lists == less.lists
    assert said.step >= plan.index_nbytes + gathered
    several, fewer = (footprint(tiny_llm.model, plan, plan.nbytes, slots=slots) for slots in (3, 1))
    assert several.lists - fewer.lists >= 2 * (plan.index_nbytes + gathered)


def test_memory_for_slots_has_the_index_in_it(tiny_llm: LLM) -> None:
    slots = bucket(304) * 6 * 2 * 2 * tiny_llm.config.head_dim * 4
    least = slots + 6 * 2 * 19 * 2 * tiny_llm.config.head_dim * 4
    with pytest.raises(FastKVError, match=f"kv_memory must be at least {least:,} bytes"):
        tiny_llm.generate([PROMPT], params(4), Quest(read_len=64, dense_layers=0), kv_memory=least - 1)
    tiny_llm.generate([PROMPT], params(4), Quest(read_len=64, dense_layers=0), kv_memory=least)


def test_a_session_goes_on_as_its_policy_reads(tiny_llm: LLM) -> None:
    """Later turns are kept whole, and read by the same policy; in a list with heads of different lengths, too."""
    for policy in (Quest(read_len=64), RocketKV(read_len=64)):
        session = tiny_llm.session(policy)
        session.add(PROMPT)
        held = session.kv_entries
        fork, other = session.fork(), tiny_llm.session(AdaKV(kv_len=40))
        other.add(PROMPT[:200])
        answer = session.generate(PROMPT[:40], params(8))
        assert session.kv_entries == held + 6 * 2 * (40 + 7)
        assert answer.metrics.read_bytes is not None
        assert answer.metrics.read_bytes < answer.metrics.kv_entries * 2 * tiny_llm.config.head_dim * 4
        mixed = tiny_llm.generate([fork.turn(PROMPT[:40]), other.turn(PROMPT[:40])], params(8))
        assert mixed[0].token_ids == answer.token_ids
        assert fork.generate([9, 9, 9], params(5)).token_ids == session.generate([9, 9, 9], params(5)).token_ids


def test_prompts_that_begin_alike_are_read_by_their_policy(tiny_llm: LLM) -> None:
    prompts = [[*PROMPT, 9, 8], [*PROMPT, 7]]
    alone = [tiny_llm.generate(prompt, params(10), Quest(read_len=64)) for prompt in prompts]
    together = tiny_llm.generate(prompts, params(10), Quest(read_len=64))
    assert [output.metrics.reused_tokens for output in together] == [0, 300]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.metrics.read_bytes for output in together] == [output.metrics.read_bytes for output in alone]


def test_a_layer_with_a_sliding_window_reads_that(tmp_path: Path) -> None:
    """Once entries have left it; before, its steps choose as those of any layer."""
    write_one_layer(tmp_path, 512, 150)
    llm = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    quest = Quest(read_len=48, dense_layers=0)
    for n_tokens, read in ((100, 32 + 4 + 1), (200, 150)):
        few = llm.generate(PROMPT[:n_tokens], params(2), quest).metrics
        extremes = 6 * 2 * 8 * 4 if n_tokens == 100 else 0
        assert few.read_bytes == read * 2 * 8 * 4 + extremes
        caches = [llm.prefill(PROMPT[:n_tokens], each).cache for each in (quest, FullKV())]
        ours, theirs = (llm.decode(cache, torch.tensor([9])) for cache in caches)
        assert torch.allclose(ours, theirs, atol=1e-6) == (n_tokens == 200)


# --- what does not go ---


def test_what_does_not_go_with_few_reads_is_one_line(tiny_llm: LLM) -> None:
    with pytest.raises(FastKVError, match=r"decode_budget does not go with policy quest, .*: leave one of them out$"):
        tiny_llm.generate(PROMPT, params(60), Quest(read_len=64), decode_budget=32)
    uneven = tiny_llm.prefill(PROMPT, AdaKV(kv_len=100)).cache
    with pytest.raises(FastKVError, match="policy quest cannot go on with a cache whose heads hold different numbers"):
        tiny_llm.prefill(PROMPT[:50], Quest(read_len=64), cache=uneven)
    with pytest.raises(FastKVError, match="read_len must be at least 18, the sinks and two more entries, not 17"):
        ClusterKV(read_len=17)


def test_compiled_steps_leave_attention_as_it_is_and_that_is_said_once(
    tiny_llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stand_in_compiler: list[Any],
    traced_once: None,
) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("a compiled step reads everything")

    expected = tiny_llm.generate(PROMPT, params(5), Quest(read_len=64)).token_ids
    row = CompiledRow(tiny_llm.model, {})
    monkeypatch.setattr(row, "logits", refused)
    monkeypatch.setattr(tiny_llm._runtime, "_said_eager", False)
    monkeypatch.setattr(tiny_llm.model, "row", row)
    with caplog.at_level(logging.WARNING, "fastkv"):
        for _ in range(2):
            assert tiny_llm.generate(PROMPT, params(5), Quest(read_len=64)).token_ids == expected
    assert stand_in_compiler
    (told,) = [record.getMessage() for record in caplog.records]
    assert "policy quest, which chooses what a step reads, have attention that is not compiled" in told
