"""Heads that keep different numbers of entries: which ones, and where they lie."""

from __future__ import annotations

import torch
from caches import live_entries, make_cache, make_pool

from fastkv.cache.dense import DenseLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.selection import PerHead, select_per_head


def test_each_head_keeps_its_best_and_the_window() -> None:
    scores = torch.tensor([[[5.0, 1, 4, 2], [1, 3, 3, 3]], [[1, 1, 1, 2], [9, 8, 7, 6]]])
    found = select_per_head(scores, torch.tensor([[4, 2], [3, 3]]), window=1)
    positions = found.positions(torch.arange(10, 15).expand(2, -1))
    assert positions[0].tolist() == [[10, 12, 13, 14], [11, 14, -1, -1]]  # of equals the first
    assert positions[1].tolist() == [[10, 13, 14, -1], [10, 11, 14, -1]]
    assert found.index[0].tolist() == [0, 2, 3, 4, 6, 9]


def test_all_entries_are_those_of_every_head() -> None:
    everything = PerHead.everything(torch.zeros(2, 3, 4, 1))
    assert everything.counts.tolist() == [[4, 4, 4]] * 2
    assert everything.positions(torch.arange(4).expand(2, -1)).tolist() == [[[0, 1, 2, 3]] * 3] * 2


def test_heads_follow_one_another_with_room_for_the_answer() -> None:
    cache = make_cache(PerHeadLayer)
    k = torch.arange(2 * 5 * 3.0).view(1, 2, 5, 3) + 1
    kept = PerHead(torch.tensor([[1, 5]]), torch.tensor([[2, 5, 6, 7, 8, 9]]), 5)
    cache.begin(whole=False, room=4)
    for layer in range(2):
        cache.store(layer, k, -k, kept, kept.positions(torch.arange(5)[None]))
    cache.end(5, position_limit=1000)
    assert cache.pool.starts[0].tolist() == [[0, 5]]  # one entry and four tokens to come
    assert cache.lengths[0].tolist() == [[1, 5]]
    assert (cache.count(0), cache.entries) == (5, 12)
    assert torch.equal(live_entries(cache.pool, 0, 0, 0)[0], k[0, 0, [2]])
    assert torch.equal(live_entries(cache.pool, 0, 0, 1)[0], k[0, 1])
    for step in range(4):
        new = torch.full((1, 2, 1, 3), 100.0 + step)
        for layer, places in zip(cache.layers, cache.pool.places(cache.slots, 1), strict=True):
            layer.append(cache.slots, new, -new, places)
        cache.advance()
        parts = cache.read(0)
        assert [part.k.shape for part in parts] == [(1, 1, 2 + step, 3), (1, 1, 6 + step, 3)]
        for part in parts:
            assert (part.k[0, 0, -1] == 100 + step).all()
            assert torch.equal(part.v, -part.k)
    assert cache.lengths[0].tolist() == [[5, 9]]
    assert torch.equal(parts[1].k[0, 0, :5], k[0, 1])  # no head has written over another
    assert cache.positions(0)[0].tolist() == [[2, -1, -1, -1, -1, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_each_sequence_of_a_store_has_its_own_counts() -> None:
    pool = make_pool(PerHeadLayer, [16], n_slots=3)
    k = torch.arange(2 * 2 * 5 * 3.0).view(2, 2, 5, 3) + 1
    counts, index = torch.tensor([[1, 5], [4, 2]]), torch.tensor([[2, 5, 6, 7, 8, 9], [0, 1, 2, 3, 7, 9]])
    pool.layers[0].store(range(1, 3), k, -k, PerHead(counts, index, 5), 4)
    assert pool.starts[0, 1:].tolist() == [[0, 5], [0, 8]]
    expected = [[k[0, 0, [2]], k[0, 1]], [k[1, 0, :4], k[1, 1, [2, 4]]]]
    for sequence in range(2):
        for head in range(2):
            assert torch.equal(live_entries(pool, 0, 1 + sequence, head)[0], expected[sequence][head])
    assert [pool.layers[0].count(slot) for slot in range(3)] == [0, 5, 4]
    assert [pool.layers[0].entries(slot) for slot in range(3)] == [0, 6, 6]


def test_unequal_heads_take_no_more_memory_than_equal_ones() -> None:
    assert make_pool(PerHeadLayer, (64, 32), n_slots=2).nbytes == make_pool(DenseLayer, (64, 32), n_slots=2).nbytes
