"""Attention to blocks of keys, one after another and in any order, is attention to all of them at once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastkv.engine.attention import attend_from
from fastkv.engine.offloading import streamed_attention as module
from fastkv.engine.offloading.streamed_attention import Places, StreamedAttention, visible_spans

T = 90
EDGES = (0, 1, 7, 16, 17, 18, 30, 31, 47, 60, 61, 88, 89, T)
PLACES = {
    "all": [list(range(T))],
    "the last": [[T - 1]],
    "the first": [[0]],
    "few": [[0, 1, 17, 18, 40, 88]],
    "two sequences": [sorted(random.Random(seed).sample(range(T), 30)) for seed in (1, 2)],
}


@pytest.mark.parametrize("window", [None, 1, 7, 30, 500])
@pytest.mark.parametrize("places", PLACES.values(), ids=list(PLACES))
def test_spans_say_who_sees_a_block_whole_in_part_and_not_at_all(places: list[list[int]], window: int | None) -> None:
    """Of every block that there is. In several sequences what is seen whole by one may be seen in part by another."""
    columns = list(zip(*places, strict=True))
    given = Places(torch.tensor(places), [min(each) for each in columns], [max(each) for each in columns])
    for first, end in itertools.combinations(EDGES, 2):
        told = ["none"] * len(columns)
        for start, stop, masked in visible_spans(given, first, end, window):
            assert start < stop
            told[start:stop] = ["some" if masked else "whole"] * (stop - start)
        for column, what in zip(columns, told, strict=True):
            seen = {_seen(place, first, end, window) for place in column}
            assert what == (seen.pop() if len(seen) == 1 else "some") or (what == "some" and len(places) > 1)


def _seen(place: int, first: int, end: int, window: int | None) -> str:
    """How much of the keys first … end - 1 a query sees."""
    count = sum(key <= place and (window is None or key > place - window) for key in range(first, end))
    return "whole" if count == end - first else "some" if count else "none"


@pytest.mark.parametrize(("masked_keys", "logits"), [(1024, 2**26), (8, 300)])
@pytest.mark.parametrize("window", [None, 1, 7, 30, 500])
@pytest.mark.parametrize("name", ["all", "few", "two sequences"])
def test_it_is_attention_to_all_keys(
    monkeypatch: pytest.MonkeyPatch, name: str, window: int | None, masked_keys: int, logits: int
) -> None:
    monkeypatch.setattr(module, "MASKED_KEYS", masked_keys)
    monkeypatch.setattr(module, "LOGITS", logits)
    torch.manual_seed(0)
    indices = torch.tensor(PLACES[name])
    batch, n_queries = indices.shape
    for n_heads, n_kv_heads in ((4, 2), (3, 3)):
        q = 2 * torch.randn(batch, n_heads, n_queries, 16)
        k, v = (torch.randn(batch, T, n_kv_heads, 16).transpose(1, 2) for _ in range(2))
        expected = attend_from(indices, q, k, v, window)
        for starts in (range(0, T, 25), [60, 30, 0], [0]):
            found = _streamed(q, indices, k, v, list(starts), window)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def _streamed(q: Tensor, indices: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], window: int | None) -> Tensor:
    attention = StreamedAttention(q, Places.of(indices, indices), k.shape[1], window)
    ends = dict(itertools.pairwise([*sorted(starts), T]))
    for start in starts:
        attention.see(start, k[:, :, start : ends[start]], v[:, :, start : ends[start]])
    return attention.result()


def test_neighbours_stand_where_they_are() -> None:
    places = Places.of_range(5, 9, torch.device("cpu"))
    assert (places.indices.tolist(), list(places.firsts), list(places.lasts)) == (
        [[5, 6, 7, 8]],
        [5, 6, 7, 8],
        [5, 6, 7, 8],
    )
