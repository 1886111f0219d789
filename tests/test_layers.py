"""Both layouts of a layer's entries keep the same promises, whatever lay in a slot before."""

from __future__ import annotations

import pytest
import torch
from caches import dead_entries, entries, live_entries, make_pool, memory_of
from torch import Tensor

from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import KVLayer, Part
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.pool import KVPool
from fastkv.cache.selection import PerHead

LAYOUTS: list[type[KVLayer]] = [DenseLayer, PerHeadLayer]
ROOM = 6
INF = float("inf")


@pytest.fixture(params=LAYOUTS, ids=["dense", "per head"])
def layout(request: pytest.FixtureRequest) -> type[KVLayer]:
    return request.param


def fill(pool: KVPool, slots: range, count: int, value: float | None = None) -> tuple[Tensor, Tensor]:
    """Store `count` entries in every layer: k and v, random or all of one value."""
    k, v = entries(count, len(slots), seed=count)
    if value is not None:
        k, v = torch.full_like(k, value), torch.full_like(v, value)
    for layer in pool.layers:
        layer.store(slots, k, v, None, ROOM)
    return k, v


def all_dead_are_zero(pool: KVPool) -> bool:
    return all(
        bool((dead_entries(pool, layer, slot) == 0).all())
        for layer in range(len(pool.layers))
        for slot in range(pool.n_slots)
    )


def seen(parts: list[Part], batch: int, n_heads: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    """What each sequence and head reads, k and v [n, D]; fails if parts leave one out or cover one twice."""
    found: list[list[tuple[Tensor, Tensor] | None]] = [[None] * n_heads for _ in range(batch)]
    for part in parts:
        for i, sequence in enumerate(range(batch)[part.sequences]):
            for j, head in enumerate(range(n_heads)[part.heads]):
                assert found[sequence][head] is None, "covered twice"
                count = part.k.shape[2] if part.live is None else int(part.live.expand(-1, n_heads, 1, 1)[i, j])
                assert part.k.isfinite().all()
                assert part.v.isfinite().all()
                found[sequence][head] = part.k[i, j, :count], part.v[i, j, :count]
    assert all(of_head is not None for of_sequence in found for of_head in of_sequence), "left out"
    return found  # type: ignore[return-value]


# --- what is not live ---


def test_new_memory_is_zero(layout: type[KVLayer]) -> None:
    """A weight of zero hides a number, not NaN."""
    assert all_dead_are_zero(make_pool(layout, n_slots=2))


def test_fewer_entries_leave_nothing_of_the_earlier_ones(layout: type[KVLayer]) -> None:
    """Keys of a sequence may have overflowed: the next one in its slot must not even multiply them by zero."""
    pool = make_pool(layout, n_slots=2)
    fill(pool, range(2), 20, INF)
    k, v = fill(pool, range(1, 2), 5)
    for layer in range(2):
        assert (dead_entries(pool, layer, 1) == 0).all()
        for head in range(2):
            for rows, expected in zip(live_entries(pool, layer, 1, head), (k, v), strict=True):
                assert torch.equal(rows, expected[0, head])
            assert (live_entries(pool, layer, 0, head)[0] == INF).all(), "a neighbour was touched"


def test_a_store_after_decode_steps_counts_anew(layout: type[KVLayer]) -> None:
    """A sequence that continues may be compressed again: what its decode steps added is among the old entries."""
    pool = make_pool(layout)
    fill(pool, range(1), 9)
    for layer, places in zip(pool.layers, pool.places(range(1), 2), strict=True):
        layer.append(range(1), *entries(2), places)
    pool.advance(range(1), 2)
    k, _ = fill(pool, range(1), 5)
    for index, layer in enumerate(pool.layers):
        assert (layer.count(0), layer.entries(0)) == (5, 10)
        assert torch.equal(live_entries(pool, index, 0, 1)[0], k[0, 1])
        assert sum(part.k.shape[1] * part.k.shape[2] for part in layer.read(range(1))) == 10


def test_heads_of_the_next_sequence_begin_on_cleared_memory() -> None:
    """Two sequences whose heads lie elsewhere: the whole slot is cleared, not the ends of the new heads alone."""
    pool = make_pool(PerHeadLayer, [16])
    first = PerHead(torch.tensor([[2, 14]]), torch.tensor([[0, 1, *range(14, 28)]]), 14)
    k = torch.full((1, 2, 14, 3), INF)
    pool.layers[0].store(range(1), k, k, first, 8)
    second = PerHead(torch.tensor([[3, 1]]), torch.tensor([[0, 1, 2, 14]]), 14)
    pool.layers[0].store(range(1), torch.ones_like(k), torch.ones_like(k), second, 8)
    assert (dead_entries(pool, 0, 0) == 0).all()


@pytest.mark.parametrize("counted", [True, False])
def test_a_released_slot_is_empty(layout: type[KVLayer], counted: bool) -> None:
    """Decode steps included, even one that was under way when the sequence ended, which nobody counts."""
    pool = make_pool(layout, n_slots=3)
    slots = [pool.take() for _ in range(3)]
    assert slots == [0, 1, 2]
    fill(pool, range(3), 9, INF)
    for step in range(3):
        new = torch.full((3, 2, 1, 3), INF)
        places = pool.places(range(3), 1)
        for layer, of_layer in zip(pool.layers, places, strict=True):
            layer.append(range(3), new, new, of_layer)
        if counted or step < 2:
            pool.advance(range(3), 1)
    pool.release(range(1, 2))
    assert pool.lengths[:, 1].sum() == 0
    assert int(pool.next_position[1]) == pool.appended[1] == 0
    for layer, storage in enumerate(pool.layers):
        assert storage.count(1) == storage.entries(1) == 0
        assert (dead_entries(pool, layer, 1) == 0).all()
        assert (pool.lengths[layer, 0] == (12 if counted else 11)).all()
    assert pool.take() == 1
    k, _ = fill(pool, range(1, 2), 4)
    assert torch.equal(live_entries(pool, 1, 1, 1)[0], k[0, 1])


def test_truncated_entries_are_zero(layout: type[KVLayer]) -> None:
    pool = make_pool(layout, n_slots=2)
    fill(pool, range(2), 9, 7.0)
    for layer in pool.layers:
        layer.truncate(range(2), 4)
    assert all_dead_are_zero(pool)
    assert (pool.lengths == 5).all()
    assert [layer.count(1) for layer in pool.layers] == [5, 5]


# --- decode steps ---


@pytest.mark.parametrize("count", [1, 3])
def test_append_writes_after_the_live_entries_and_nowhere_else(layout: type[KVLayer], count: int) -> None:
    """The slow twin writes entry by entry."""
    pool = make_pool(layout, (32, 64), n_slots=3)
    for slot, stored in enumerate((9, 2, 14)):
        fill(pool, range(slot, slot + 1), stored)
    slots = range(1, 3)
    for step in range(2):
        k, v = entries(count, len(slots), seed=50 + step)
        places = pool.places(slots, count)
        for layer, storage in enumerate(pool.layers):
            expected = [rows.clone() for rows in memory_of(pool, layer)]
            for index, slot in enumerate(slots):
                for head in range(2):
                    first = int(pool.starts[layer, slot, head] + pool.lengths[layer, slot, head])
                    for token in range(count):
                        expected[0][slot, first + token] = k[index, head, token]
                        expected[1][slot, first + token] = v[index, head, token]
            storage.append(slots, k, v, places[layer])
            assert all(torch.equal(a, b) for a, b in zip(memory_of(pool, layer), expected, strict=True))
        pool.advance(slots, count)
    added = 2 * count
    assert pool.lengths[:, :, 0].tolist() == [[9, 2 + added, 14 + added]] * 2
    assert pool.next_position.tolist() == [0, added, added]
    assert [pool.layers[0].count(slot) for slot in range(3)] == [9, 2 + added, 14 + added]
    assert [pool.layers[0].entries(slot) for slot in range(3)] == [18, 2 * (2 + added), 2 * (14 + added)]


def test_heads_of_one_sequence_do_not_write_over_one_another(layout: type[KVLayer]) -> None:
    """As many steps as there is room for."""
    pool = make_pool(layout, [16])
    k, v = fill(pool, range(1), 10)
    more = [entries(1, seed=step) for step in range(ROOM)]
    for new_k, new_v in more:
        pool.layers[0].append(range(1), new_k, new_v, pool.places(range(1), 1)[0])
        pool.advance(range(1), 1)
    for head in range(2):
        for rows, old, new in zip(live_entries(pool, 0, 0, head), (k, v), zip(*more, strict=True), strict=True):
            assert torch.equal(rows, torch.cat((old, *new), dim=2)[0, head])


# --- what attention reads ---

# stored entries of neighbouring slots -> parts of a dense layer, and whether a mask is needed
READS = [
    ((9, 9, 9), 1, False),
    ((10, 8, 9), 1, True),
    ((10, 6), 1, True),  # 20 entries read for 16 live ones: just within the waste that is allowed
    ((10, 5), 2, False),
    ((9, 2, 9), 3, False),
    ((7,), 1, False),
]


@pytest.mark.parametrize(("stored", "n_parts", "masked"), READS)
@pytest.mark.parametrize("new", [0, 2])
def test_reading_covers_every_sequence_and_head_once(
    layout: type[KVLayer], stored: tuple[int, ...], n_parts: int, masked: bool, new: int
) -> None:
    pool = make_pool(layout, n_slots=1 + len(stored))
    written = [fill(pool, range(slot, slot + 1), count) for slot, count in enumerate(stored, 1)]
    slots = range(1, 1 + len(stored))
    if new:
        more = entries(new, len(stored), seed=99)
        pool.layers[0].append(slots, *more, pool.places(slots, new)[0])
        written = [
            (torch.cat((k, more[0][i : i + 1]), dim=2), torch.cat((v, more[1][i : i + 1]), dim=2))
            for i, (k, v) in enumerate(written)
        ]
    parts = pool.layers[0].read(slots, new)
    for of_sequence, (k, v) in zip(seen(parts, len(stored)), written, strict=True):
        for head, (found_k, found_v) in enumerate(of_sequence):
            assert torch.equal(found_k, k[0, head])
            assert torch.equal(found_v, v[0, head])
    memory = {rows.untyped_storage().data_ptr() for rows in memory_of(pool, 0)}
    assert all(part.k.untyped_storage().data_ptr() in memory for part in parts), "a copy"
    if layout is PerHeadLayer:
        assert len(parts) == 2 * len(stored)
    elif not new:  # with new entries the difference is a smaller share
        assert len(parts) == n_parts
        assert (parts[0].live is not None) == masked


def test_padded_begins_with_the_live_entries(layout: type[KVLayer]) -> None:
    pool = make_pool(layout, n_slots=3)
    written = [fill(pool, range(slot, slot + 1), count) for slot, count in enumerate((9, 4, 12))]
    k, v = pool.layers[0].padded(range(1, 3), 16)
    assert k.shape == v.shape == (2, 2, 16, 3)
    for index, count in enumerate((4, 12)):
        assert torch.equal(k[index, :, :count], written[1 + index][0][0])
        assert torch.equal(v[index, :, :count], written[1 + index][1][0])
    assert k.isfinite().all()


def test_padded_never_reads_beyond_the_memory() -> None:
    """A span for the longest head that there could be is far more than what lies after the last head's beginning."""
    pool = make_pool(PerHeadLayer, [32], n_slots=2)
    k, _ = fill(pool, range(1, 2), 20)
    span = pool.layers[0].span(1)
    assert span == 64
    padded, _ = pool.layers[0].padded(range(1, 2), span)
    assert torch.equal(padded[0, 1, :20], k[0, 1])


def test_span_is_room_for_the_answer_too() -> None:
    pool = make_pool(DenseLayer, [64], n_slots=2)
    fill(pool, range(1), 20)
    assert [pool.layers[0].span(slot) for slot in range(2)] == [20 + ROOM, 0]
    pool.layers[0].clear(range(1))
    assert pool.layers[0].span(0) == 0


def test_flat_memory_is_addressed_by_slot_start_and_length(layout: type[KVLayer]) -> None:
    pool = make_pool(layout, n_slots=2)
    k, _ = fill(pool, range(1, 2), 5)
    flat = pool.layers[0].flat()
    assert flat is not None
    first = 2 * 32 + int(pool.starts[0, 1, 1])
    assert torch.equal(flat[0][first : first + 5], k[0, 1])
    assert flat[0].untyped_storage().data_ptr() == memory_of(pool, 0)[0].untyped_storage().data_ptr()


def test_addresses_never_change(layout: type[KVLayer]) -> None:
    """A captured graph reads them."""
    pool = make_pool(layout, n_slots=2)

    def addresses() -> list[int]:
        flat = [rows for layer in range(2) for rows in memory_of(pool, layer)]
        return [tensor.data_ptr() for tensor in (pool.lengths, pool.starts, pool.next_position, *flat)]

    before = addresses()
    fill(pool, range(2), 12)
    new = torch.ones(2, 2, 1, 3)
    for layer, places in zip(pool.layers, pool.places(range(2), 1), strict=True):
        layer.append(range(2), new, new, places)
    pool.advance(range(2), 1)
    pool.release(range(2))
    assert addresses() == before


# --- a slot on its own ---


def test_state_is_taken_back_by_any_pool_of_the_layout(layout: type[KVLayer]) -> None:
    pool, other = make_pool(layout, n_slots=2), make_pool(layout, (64, 96), n_slots=3)
    fill(pool, range(1, 2), 7)
    fill(other, range(3), 20, INF)
    new = entries(1, seed=3)
    for layer, places in zip(pool.layers, pool.places(range(1, 2), 1), strict=True):
        layer.append(range(1, 2), *new, places)
    pool.advance(range(1, 2), 1)
    states = [layer.state(1) for layer in pool.layers]
    before = [[live_entries(pool, layer, 1, head) for head in range(2)] for layer in range(2)]
    pool.release(range(1, 2))
    for layer, state in zip(other.layers, states, strict=True):
        layer.restore(2, state, ROOM)
    for layer in range(2):
        assert (dead_entries(other, layer, 2) == 0).all()
        assert other.layers[layer].count(2) == 8
        for head in range(2):
            found = live_entries(other, layer, 2, head)
            assert all(torch.equal(a, b) for a, b in zip(found, before[layer][head], strict=True))
