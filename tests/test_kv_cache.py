"""The cache: allocated once, as large as promised, and written in place."""

from __future__ import annotations

import functools

import pytest
import torch
from caches import make_cache

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.storage import BLOCK, KVStorage, bucket

make = functools.partial(make_cache, kind=KVCache)


def test_capacity_is_rounded_up_to_a_block() -> None:
    cache = make([28, 29, 1])
    assert [buffer.shape for buffer in cache.k] == [(1, 2, BLOCK, 3), (1, 2, 2 * BLOCK, 3), (1, 2, BLOCK, 3)]
    assert cache.nbytes == 2 * 4 * BLOCK * 2 * 4 * 3 == 4 * KVCache.size_of([28, 29, 1], 4, 2, 3)


def test_bytes_of_llama_31() -> None:
    """128 KiB a token in bfloat16: 2 (K and V) x 32 layers x 8 heads x 128 values x 2 bytes."""
    assert 2 * KVCache.size_of([131_072] * 32, 0, 8, 128) == 131_072 * 128 * 1024


def test_unused_slots_are_zero() -> None:
    """NaN in a masked slot would survive a weight of zero."""
    assert all((buffer == 0).all() for buffer in [*make([5]).k, *make([5]).v])


def test_load_gathers_each_heads_own_entries() -> None:
    cache = make([2])
    k = torch.arange(2 * 4 * 3.0).view(1, 2, 4, 3)
    cache.load(0, k, -k, torch.tensor([[[0, 3], [1, 2]]]))
    assert torch.equal(cache.k[0][0, :, :2], torch.stack((k[0, 0, [0, 3]], k[0, 1, [1, 2]])))
    assert torch.equal(cache.v[0], -cache.k[0])
    assert cache.lengths.tolist() == [[[2, 2]]]


def test_append_writes_the_next_slot_and_nothing_else() -> None:
    cache = make([2, 5])
    for layer, count in enumerate([2, 5]):
        filled = torch.full((1, 2, count, 3), 7.0)
        cache.load(layer, filled, filled, None)
    for step in range(3):
        new = torch.full((1, 2, 1, 3), float(step))
        for layer, count in enumerate([2, 5]):
            keys, values = cache.append(layer, new, -new)
            assert keys.shape == values.shape == (1, 2, count + step + 1, 3)
            assert (keys[:, :, -1] == step).all()
            assert (values[:, :, -1] == -step).all()
            assert (keys[:, :, :count] == 7).all()
        cache.advance()
    assert cache.lengths.tolist() == [[[5, 5]], [[8, 8]]]
    assert [cache.length(0), cache.length(1)] == [5, 8]
    assert cache.next_position.tolist() == [103]
    assert (cache.k[0][:, :, 5:] == 0).all()


def test_a_full_cache_says_so(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill([5, 6, 7], max_tokens=1)
    tiny_llm.decode(pre.cache, torch.tensor([3]))
    with pytest.raises(FastKVError, match="max_tokens=1"):
        tiny_llm.decode(pre.cache, torch.tensor([3]))


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8)])
def test_decoding_never_reallocates(tiny_llm: LLM, policy: FullKV | FastKV) -> None:
    pre = tiny_llm.prefill(list(range(3, 203)), policy, max_tokens=40)
    before = [buffer.data_ptr() for buffer in [*pre.cache.k, *pre.cache.v]]
    size = pre.cache.nbytes
    for _ in range(40):
        tiny_llm.decode(pre.cache, torch.tensor([9]))
    assert [buffer.data_ptr() for buffer in [*pre.cache.k, *pre.cache.v]] == before
    assert pre.cache.nbytes == size


def test_kv_bytes_are_the_bytes_allocated(tiny_llm: LLM) -> None:
    config = tiny_llm.config
    ids, params = list(range(3, 253)) * 8, SamplingParams(max_tokens=12, ignore_eos=True)

    def formula(kept: int) -> int:
        slots = -(-(kept + 12) // BLOCK) * BLOCK
        return 2 * config.n_layers * config.n_kv_heads * slots * config.head_dim * 4

    full = tiny_llm.generate(ids, params, FullKV()).metrics
    fast = tiny_llm.generate(ids, params, FastKV()).metrics
    assert full.kv_bytes == full.kv_full_bytes == fast.kv_full_bytes == formula(2000)
    assert fast.kv_bytes == formula(200)
    assert fast.kv_bytes * 8 < full.kv_bytes
    assert tiny_llm.prefill(ids, FastKV(), max_tokens=12).cache.nbytes == fast.kv_bytes
    assert (fast.kv_tokens, fast.kv_entries, fast.kv_full_entries) == (200, 200 * 12, 2000 * 12)


def test_buckets_are_few_and_at_most_an_eighth_too_large() -> None:
    lengths = [bucket(n) for n in range(1, 100_000)]
    assert all(n <= there <= max(n + 31, n * 1.125) for n, there in enumerate(lengths, 1))
    assert len(set(lengths)) < 80
    assert all(length % BLOCK == 0 for length in lengths)


def test_a_cache_in_used_storage_is_as_good_as_new() -> None:
    """What the text before left in the slots could be infinite; a weight of zero would make NaN of it."""
    storage = KVStorage.allocate([96, 160], 1, 2, 3, dtype=torch.float32, device=torch.device("cpu"))
    for buffer in [*storage.k, *storage.v]:
        buffer.fill_(float("inf"))
    storage.lengths.fill_(50)
    cache = make([40, 5], storage=storage)
    assert cache.k[0].data_ptr() == storage.k[0].data_ptr()
    assert [buffer.shape[2] for buffer in cache.k] == [2 * BLOCK, BLOCK]
    assert cache.nbytes == make([40, 5]).nbytes
    for layer, count in enumerate([40, 5]):
        filled = torch.ones(1, 2, count, 3)
        cache.load(layer, filled, filled, None)
        assert cache.k[layer].isfinite().all()
        assert cache.v[layer].isfinite().all()
        assert storage.k[layer][:, :, : bucket(cache.k[layer].shape[2])].isfinite().all()
    assert cache.lengths.tolist() == [[[40, 40]], [[5, 5]]]
    assert cache.next_position.tolist() == [100]
