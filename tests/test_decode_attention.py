"""Attention of a decode step, in its three ways, against a slow twin that takes each sequence and head on its own.

The varlen kernel needs a GPU. Here a slow function with its documented meaning stands in for it, so that what is handed
to it (sequences, starts, lengths) is checked; tests/gpu compares the kernel itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import CPU, entries, live_entries, make_pool
from torch import Tensor

from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.pool import KVPool
from fastkv.cache.selection import PerHead
from fastkv.engine import decode_attention as module
from fastkv.engine.decode_attention import EagerAttention, MaskedAttention, VarlenAttention, graph_attention

SHAPE = EntryShape(2, 8, torch.float32)
CAPACITIES = (96, 64)
SPANS = (96, 64)
WINDOWS = [None, 5, 200]
LAYOUTS: list[type[KVLayer]] = [DenseLayer, PerHeadLayer, ModelWideLayer]
# entries of each slot, in layer 0 and in layer 1: far apart, nearly equal, equal; an empty slot is one at rest
LENGTHS: dict[str, Sequence[tuple[int, int]]] = {
    "far apart": [(70, 33), (2, 55), (0, 0), (41, 9)],
    "nearly equal": [(50, 40), (47, 41), (49, 38), (51, 40)],
    "equal": [(30, 30)] * 4,
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=LAYOUTS, ids=["dense", "per head", "model wide"])
def layout(request: pytest.FixtureRequest) -> type[KVLayer]:
    return request.param


def pool_of(layout: type[KVLayer], lengths: Sequence[tuple[int, int]]) -> KVPool:
    """Random entries, the same for every call; the second head of the other layout has a third of the first one's."""
    pool = make_pool(layout, CAPACITIES, len(lengths), SHAPE)
    for slot, counts in enumerate(lengths):
        for layer, count in enumerate(counts):
            k, v = entries(count, seed=10 * slot + layer, head_dim=8)
            kept = None
            if layout.per_head:
                index = torch.cat((torch.arange(count), count + torch.arange(count // 3)))
                kept = PerHead(torch.tensor([[count, count // 3]]), index[None], count) if count else None
            pool.layers[layer].store(range(slot, slot + 1), k, v, kept, 8)
    return pool


def slow_step(pool: KVPool, layer: int, slot: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: q [Hq, T, D], k and v [Hkv, T, D]. -> [Hq, T, D]. Reads what the device knows to be live."""
    out, group = torch.empty_like(q), q.shape[0] // 2
    for query_head in range(q.shape[0]):
        head = query_head // group
        old = live_entries(pool, layer, slot, head)
        for token in range(q.shape[1]):
            keys, values = (
                torch.cat((before, new[head, : token + 1])) for before, new in zip(old, (k, v), strict=True)
            )
            if window is not None:
                keys, values = keys[-window:], values[-window:]
            weights = (keys @ q[query_head, token] / q.shape[2] ** 0.5).softmax(0)
            out[query_head, token] = weights @ values
    return out


def slow(pool: KVPool, layer: int, slots: Sequence[int], step: tuple[Tensor, ...], window: int | None) -> Tensor:
    return torch.stack(
        [slow_step(pool, layer, slot, *(tensor[index] for tensor in step), window) for index, slot in enumerate(slots)]
    )


def step_of(batch: int, n_heads: int, count: int, seed: int) -> tuple[Tensor, ...]:
    """Random q [B, Hq, T, D], k and v [B, Hkv, T, D]."""
    torch.manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, 8) for heads in (n_heads, 2, 2))


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    seqused_k: Tensor,
    enable_gqa: bool = False,
) -> Tensor:
    """query [T_q, Hq, D], key and value [T_k, Hkv, D]: sequence i has the tokens from cu_seq[i] on."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max())
    assert all(tensor.dtype == torch.int32 for tensor in (cu_seq_q, cu_seq_k, seqused_k))
    out = torch.empty_like(query)
    for index in range(len(cu_seq_q) - 1):
        first, count = int(cu_seq_k[index]), int(seqused_k[index])
        assert count <= max_k
        assert first + count <= int(cu_seq_k[index + 1])
        rows = slice(int(cu_seq_q[index]), int(cu_seq_q[index + 1]))
        k, v = key[first : first + count], value[first : first + count]
        weights = torch.einsum("qhd,khd->hqk", query[rows], k.expand(-1, query.shape[1], -1)) / query.shape[-1] ** 0.5
        out[rows] = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v.expand(-1, query.shape[1], -1))
    return out


def varlen_without_gqa_setting(*arguments: Any, seqused_k: Tensor) -> Tensor:
    """As in a version of torch whose function takes grouped heads without being asked."""
    return varlen(*arguments, seqused_k=seqused_k, enable_gqa=True)


def varlen_without_lengths(*arguments: Any) -> Tensor:
    """As in a version of torch whose function does not take the lengths: the kernel below it does."""
    raise AssertionError("not to be called")


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("count", [1, 3])
def test_eager_attention_is_the_slow_twin(
    layout: type[KVLayer], lengths: Sequence[tuple[int, int]], window: int | None, count: int
) -> None:
    """Of the slots 0, 2 and 3, which are two runs of neighbours, for several steps."""
    pool, slots = pool_of(layout, lengths), [0, 2, 3]
    for step in range(2):
        attention = EagerAttention(pool, [range(1), range(2, 4)], count, [window] * 2)
        for layer in range(2):
            new = step_of(3, 6, count, seed=step)
            expected = slow(pool, layer, slots, new, window)
            torch.testing.assert_close(attention(layer, *new), expected, atol=1e-5, rtol=1e-5)
        for run in (range(1), range(2, 4)):
            pool.advance(run, count)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("n", [1, 4])
def test_masked_attention_is_the_eager_one(
    layout: type[KVLayer], lengths: Sequence[tuple[int, int]], window: int | None, n: int
) -> None:
    """It reads no count of the host, and a slot at rest, which computes along, disturbs nobody."""
    pool, eager = pool_of(layout, lengths), pool_of(layout, lengths)
    spans = SPANS if layout is DenseLayer else (2 * 96, 2 * 64)
    masked = MaskedAttention(pool, n, spans, [window] * 2)
    for step in range(3):
        plain = EagerAttention(eager, [range(n)], 1, [window] * 2)
        masked.begin()
        for layer in range(2):
            new = step_of(n, 6, 1, seed=step)
            expected = slow(eager, layer, range(n), new, window)
            found = masked(layer, *new)
            assert found.shape == (n, 6, 1, 8)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found, plain(layer, *new), atol=1e-5, rtol=1e-5)
        pool.lengths[:, :n] += 1  # as a graph does it: the host counts nothing
        eager.advance(range(n), 1)
    assert pool.appended == [0] * 4


@pytest.mark.parametrize("function", [varlen, varlen_without_gqa_setting, varlen_without_lengths])
@pytest.mark.parametrize("n", [1, 4])
def test_varlen_attention_is_the_masked_one(
    monkeypatch: pytest.MonkeyPatch, layout: type[KVLayer], function: Any, n: int
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr(module, "_flash_forward", varlen_without_gqa_setting)
    lengths = LENGTHS["far apart"]
    spans = SPANS if layout is DenseLayer else (2 * 96, 2 * 64)
    for heads, windows in ((2, [None, None]), (6, [None, 7])):  # one and three query heads for each KV head
        pools = [pool_of(layout, lengths) for _ in range(2)]
        ways = [
            kind(pool, n, spans, windows) for kind, pool in zip((VarlenAttention, MaskedAttention), pools, strict=True)
        ]
        for step in range(3):  # lengths move on the device; nothing is baked in
            for way in ways:
                way.begin()
            for layer in range(2):
                new = step_of(n, heads, 1, seed=step)
                fast, plain = (way(layer, *new) for way in ways)
                torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
            for pool in pools:
                pool.lengths[:, :n] += 1


def test_a_shorter_last_slot_is_not_read_beyond_the_slots_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets the memory of the first n slots; the others may belong to nobody."""
    handed: list[int] = []

    def noted(query: Tensor, key: Tensor, *others: Any, **more: Any) -> Tensor:
        handed.append(key.shape[0])
        return varlen(query, key, *others, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", noted)
    attention = VarlenAttention(pool_of(DenseLayer, LENGTHS["equal"]), 2, SPANS, [None, None])
    monkeypatch.setattr(attention, "_attend", lambda *a, **b: noted(*a, enable_gqa=True, **b))
    attention.begin()
    attention(1, *step_of(2, 6, 1, seed=0))
    assert handed == [2 * 2 * 64]


# --- which of them a graph holds ---


def test_the_choice_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    assert module._agree_on_a_sample(SHAPE, 4, CPU)

    def blind(*arguments: Any, seqused_k: Tensor, enable_gqa: bool) -> Tensor:
        """Attends to one dead entry, too."""
        return varlen(*arguments, seqused_k=seqused_k + 1, enable_gqa=enable_gqa)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", blind)
    assert not module._agree_on_a_sample(SHAPE, 4, CPU)


def pool_on_a_gpu(dtype: torch.dtype, layer: Any) -> Any:
    """What graph_attention asks of a pool."""
    shape = EntryShape(2, 8, dtype)
    return SimpleNamespace(device=torch.device("cuda"), shape=shape, layers=[layer], layout=DenseLayer)


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(DenseLayer, LENGTHS["equal"])
    assert graph_attention(pool, 4) == (MaskedAttention, "varlen attention runs on a GPU")
    flat, pages = pool.layers[0], SimpleNamespace(flat=lambda: None)
    chosen, why = graph_attention(pool_on_a_gpu(torch.float32, flat), 4)
    assert (chosen, why) == (MaskedAttention, "varlen attention computes in bfloat16 or float16")
    chosen, why = graph_attention(pool_on_a_gpu(torch.bfloat16, pages), 4)
    assert (chosen, why) == (MaskedAttention, "varlen attention needs flat memory, which DenseLayer has not")
    for sample, expected in (
        (lambda *sizes: True, (VarlenAttention, None)),
        (lambda *sizes: False, (MaskedAttention, "varlen attention gives other results here")),
    ):
        monkeypatch.setattr(module, "_agree_on_a_sample", sample)
        assert graph_attention(pool_on_a_gpu(torch.bfloat16, flat), 4) == expected

    def unknown(*sizes: Any) -> bool:
        raise TypeError("unexpected keyword\nand a long story")

    monkeypatch.setattr(module, "_agree_on_a_sample", unknown)
    chosen, why = graph_attention(pool_on_a_gpu(torch.bfloat16, flat), 4)
    assert (chosen, why) == (MaskedAttention, "no varlen attention (unexpected keyword)")
