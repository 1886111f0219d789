"""The cache: allocated once, as large as promised, and written in place."""

from __future__ import annotations

import pytest
import torch
from caches import CPU, entries, live_entries, make_cache, make_pool

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.pool import BLOCK, KVPool, bucket, bytes_of, round_up

EACH = pytest.mark.parametrize(
    "layout", [DenseLayer, PerHeadLayer, ModelWideLayer], ids=["dense", "per head", "model wide"]
)


# --- bytes ---


def test_bytes_of_llama_31() -> None:
    """128 KiB a token in bfloat16: 2 (K and V) x 32 layers x 8 heads x 128 values x 2 bytes."""
    shape = EntryShape(8, 128, torch.bfloat16)
    assert bytes_of(DenseLayer, [131_072] * 32, shape) == 131_072 * 128 * 1024


@EACH
def test_bytes_are_those_that_are_allocated(layout: type[KVLayer]) -> None:
    """The formula, which requests are planned by, against the tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = EntryShape(2, 3, dtype)
        pool = make_pool(layout, (32, 96), n_slots=3, shape=shape)
        flat = {rows.data_ptr(): rows for layer in pool.layers for rows in layer.flat() or ()}  # layers may share it
        assert pool.nbytes == sum(rows.numel() * rows.element_size() for rows in flat.values())
        assert pool.nbytes == 3 * bytes_of(layout, (32, 96), shape)
        assert KVCache(pool, range(2), 4, 1000).nbytes * 3 == pool.nbytes * 2


def test_capacity_is_rounded_up_to_a_block() -> None:
    assert [round_up(count) for count in (1, 32, 33, 64, 65)] == [BLOCK, BLOCK, 2 * BLOCK, 2 * BLOCK, 3 * BLOCK]


def test_buckets_are_few_and_at_most_an_eighth_too_large() -> None:
    lengths = [bucket(n) for n in range(1, 100_000)]
    assert all(n <= there <= max(n + 31, n * 1.125) for n, there in enumerate(lengths, 1))
    assert len(set(lengths)) < 80
    assert all(length % BLOCK == 0 for length in lengths)


def test_kv_bytes_are_the_bytes_allocated(tiny_llm: LLM) -> None:
    config = tiny_llm.config
    ids, params = list(range(3, 253)) * 8, SamplingParams(max_tokens=12, ignore_eos=True)

    def formula(kept: int) -> int:
        capacity = -(-(kept + 12) // BLOCK) * BLOCK
        return 2 * config.n_layers * config.n_kv_heads * capacity * config.head_dim * 4

    full = tiny_llm.generate(ids, params, FullKV()).metrics
    fast = tiny_llm.generate(ids, params, FastKV()).metrics
    assert full.kv_bytes == full.kv_full_bytes == fast.kv_full_bytes == formula(2000)
    assert fast.kv_bytes == formula(200)
    assert fast.kv_bytes * 8 < full.kv_bytes
    assert tiny_llm.prefill(ids, FastKV(), max_tokens=12).cache.nbytes == fast.kv_bytes
    assert (fast.kv_tokens, fast.kv_entries, fast.kv_full_entries) == (200, 200 * 12, 2000 * 12)


# --- the pool ---


def test_the_lowest_free_slot_is_taken() -> None:
    """Sequences that lie next to one another are attended to in one call."""
    pool = make_pool(DenseLayer, n_slots=4)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    pool.release(range(1))
    pool.release(range(2, 3))
    assert [pool.take(), pool.take()] == [0, 2]


def test_a_pool_holds_what_fits_of_its_layout() -> None:
    pool = make_pool(DenseLayer, (32, 64), n_slots=2)
    assert pool.holds(DenseLayer, (32, 64), 2)
    assert pool.holds(DenseLayer, (32, 32), 1)
    assert not pool.holds(DenseLayer, (33, 32), 1)
    assert not pool.holds(DenseLayer, (32, 65), 1)
    assert not pool.holds(DenseLayer, (32, 32), 3)
    assert not pool.holds(PerHeadLayer, (32, 32), 1)


@EACH
def test_places_follow_the_live_entries(layout: type[KVLayer]) -> None:
    pool = make_pool(layout, (16, 16), n_slots=2)
    pool.lengths.copy_(torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]))
    assert pool.places(range(1, 2), 1).tolist() == [[[[3], [20]]], [[[7], [24]]]]
    assert pool.places(range(2), 2)[0].tolist() == [[[1, 2], [18, 19]], [[3, 4], [20, 21]]]


def test_the_host_counts_where_the_device_counts_for_itself() -> None:
    cache = make_cache(DenseLayer)
    cache.begin(whole=True, room=4)
    for layer in range(2):
        cache.store(layer, *entries(5), None, torch.arange(5).expand(1, 2, -1))
    cache.end(5, position_limit=1000)
    cache.advance(on_device=False)
    assert cache.count(0) == 6
    assert (cache.lengths == 5).all()
    assert cache.next_position.tolist() == [5]
    cache.advance()
    assert cache.count(0) == 7
    assert (cache.lengths == 6).all()
    assert (cache.position, cache.room) == (7, 2)


# --- a sequence ---


def test_store_gathers_each_heads_own_entries() -> None:
    cache = make_cache(DenseLayer)
    k = torch.arange(2 * 4 * 3.0).view(1, 2, 4, 3)
    index = torch.tensor([[[0, 3], [1, 2]]])
    cache.begin(whole=False, room=4)
    for layer in range(2):
        cache.store(layer, k, -k, index, index + 10)
    cache.end(100, position_limit=1000)
    for head, chosen in ((0, [0, 3]), (1, [1, 2])):
        found_k, found_v = live_entries(cache.pool, 0, 0, head)
        assert torch.equal(found_k, k[0, head, chosen])
        assert torch.equal(found_v, -found_k)
    assert cache.lengths.tolist() == [[[2, 2]]] * 2
    assert (cache.count(0), cache.entries) == (2, 8)
    assert torch.equal(cache.positions(0), index + 10)
    assert cache.next_position.tolist() == [100]


@EACH
def test_append_writes_the_next_entry_and_nothing_else(layout: type[KVLayer]) -> None:
    """Layers of different lengths, one step after the other, as a decode step does it."""
    cache = make_cache(layout)
    cache.begin(whole=False, room=4)
    for layer, count in enumerate([2, 5]):
        filled = torch.full((1, 2, count, 3), 7.0)
        cache.store(layer, filled, filled, None, torch.arange(count).expand(1, 2, -1))
    cache.end(100, position_limit=1000)
    for step in range(3):
        new = torch.full((1, 2, 1, 3), float(step))
        places = cache.pool.places(cache.slots, 1)
        for layer, storage in enumerate(cache.layers):
            storage.append(cache.slots, new, -new, places[layer])
        cache.advance()
        for layer, count in enumerate([2, 5]):
            for head in range(2):
                k, v = live_entries(cache.pool, layer, 0, head)
                assert (k[:count] == 7).all()
                assert k[count:, 0].tolist() == list(range(step + 1))
                assert torch.equal(v[count:], -k[count:])
    assert cache.lengths.tolist() == [[[5, 5]], [[8, 8]]]
    assert [cache.count(0), cache.count(1)] == [5, 8]
    assert cache.next_position.tolist() == [103]
    assert cache.positions(1)[0, 1].tolist() == [0, 1, 2, 3, 4, 100, 101, 102]


def test_a_full_cache_says_so(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill([5, 6, 7], max_tokens=1)
    tiny_llm.decode(pre.cache, torch.tensor([3]))
    with pytest.raises(FastKVError, match="room for 0 more tokens, not 1; prefill with more max_tokens"):
        tiny_llm.decode(pre.cache, torch.tensor([3]))


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8)])
def test_decoding_never_reallocates(tiny_llm: LLM, policy: FullKV | FastKV) -> None:
    cache = tiny_llm.prefill(list(range(3, 203)), policy, max_tokens=40).cache

    def addresses() -> list[int]:
        return [rows.data_ptr() for layer in cache.layers for rows in layer.flat() or ()]

    before, size = addresses(), cache.nbytes
    for _ in range(40):
        tiny_llm.decode(cache, torch.tensor([9]))
    assert addresses() == before
    assert len(before) == 12
    assert cache.nbytes == size


@EACH
def test_a_cache_in_a_used_slot_is_as_good_as_new(layout: type[KVLayer]) -> None:
    """What the sequence before left could be infinite; a weight of zero would make NaN of it."""
    pool = KVPool(layout, [64, 64], 2, EntryShape(2, 3, torch.float32), CPU)
    for seed, counts in enumerate([(60, 50), (40, 5)]):
        slot = pool.take()
        cache = KVCache(pool, range(slot, slot + 1), 4, 1000)
        cache.begin(whole=False, room=4)
        for layer, count in enumerate(counts):
            k, v = entries(count, seed=seed) if seed else (torch.full((1, 2, count, 3), float("inf")),) * 2
            cache.store(layer, k, v, None, torch.arange(count).expand(1, 2, -1))
        cache.end(100, position_limit=1000)
        if not seed:
            cache.advance()
            pool.release(cache.slots)
    assert slot == 0
    assert cache.lengths.tolist() == [[[40, 40]], [[5, 5]]]
    assert cache.next_position.tolist() == [100]
    assert (cache.count(0), cache.count(1)) == (40, 5)
    for storage in pool.layers:
        assert all(rows.isfinite().all() for rows in storage.flat() or ())
    assert torch.equal(live_entries(pool, 0, 0, 1)[0], entries(40, seed=1)[0][0, 1])
