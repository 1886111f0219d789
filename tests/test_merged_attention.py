"""Attention of some tokens from two parts, against one mask over all keys. Here by the CPU's own flash attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV
from fastkv.engine import attention, prefill
from fastkv.engine import merged_attention as module
from fastkv.engine.attention import attend_from, causal_attention, take_tokens
from fastkv.engine.merged_attention import merged_attention, why_not_merged
from fastkv.models.llama import Llama

CPU, T = torch.device("cpu"), 300


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def heads_of(batch: int, n_heads: int, n_kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of T tokens, with the gaps between sequences that a prefill's memory has."""
    torch.manual_seed(n_heads)
    heads = torch.randn(batch, n_heads + 2 * n_kv_heads, T, 16).to(dtype)
    heads[:, -n_kv_heads:, T // 2 :] += 1  # values that tell the parts apart
    q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=1)
    return q, k, v


@cache
def all_heads(batch: int, n_heads: int, n_kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v, and attention of all tokens in float32."""
    q, k, v = heads_of(batch, n_heads, n_kv_heads, dtype)
    return q, k, v, causal_attention(q.float(), k.float(), v.float())


def chosen_at_random(seed: int, count: int) -> list[int]:
    return torch.randperm(T, generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()


PLACES: dict[str, list[list[int]]] = {
    "one": [[137]],
    "the first alone": [[0]],
    "the last alone": [[T - 1]],
    "all": [list(range(T))],
    "adjacent": [list(range(90, 200))],
    "adjacent from the first on": [list(range(130))],
    "adjacent to the last": [list(range(T - 70, T))],
    "far apart": [[0, 1, 2, 150, 151, T - 2, T - 1]],
    "without the first": [[1, *range(20, 100, 3)]],
    "some": [chosen_at_random(1, 120)],
    "two sequences": [chosen_at_random(2, 90), chosen_at_random(3, 90)],
    "sequences that share no place": [list(range(5, 75)), list(range(T - 70, T))],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=list(PLACES))
@pytest.mark.parametrize(("block", "logits"), [(1024, 2**26), (32, 2**26), (64, 3000), (64, 1)])
def test_it_is_attention_of_all_tokens_at_some(
    monkeypatch: pytest.MonkeyPatch, places: list[list[int]], block: int, logits: int
) -> None:
    """In float32 to its last bits; in bfloat16, against float32 attention of the same values, to three roundings."""
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_LOGITS", logits)
    indices = torch.tensor(places)
    for n_heads, n_kv_heads in ((4, 2), (8, 1), (3, 3)):
        for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
            q, k, v, attended = all_heads(len(places), n_heads, n_kv_heads, dtype)
            some = take_tokens(q, indices)
            found = merged_attention(indices, some, k, v)
            assert (found.dtype, found.shape) == (dtype, some.shape)
            torch.testing.assert_close(found.float(), take_tokens(attended, indices), atol=atol, rtol=1e-5)


def test_it_is_what_one_mask_gives() -> None:
    q, k, v = heads_of(2, 4, 2, torch.float32)
    indices = torch.tensor(PLACES["two sequences"])
    some = take_tokens(q, indices)
    expected = attend_from(indices, some, k, v)
    torch.testing.assert_close(merged_attention(indices, some, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 40, 1000, 10**9])
def test_blocks_are_all_queries_and_no_larger_than_they_may_be(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", 16)
    firsts = chosen_at_random(4, 77)
    lasts = [min(T - 1, place + 2) for place in firsts]
    blocks = list(module._blocks(firsts, lasts, most))
    assert [start for start, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == 77
    for start, end in blocks:
        count = end - start
        assert 1 <= count <= 16
        assert count == 1 or count * (lasts[end - 1] + 1 - firsts[start]) <= most
    if most == 10**9:
        assert [end - start for start, end in blocks] == [16, 16, 16, 16, 13]


def test_keys_before_a_block_are_left_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than these: the plain products are those of the keys from a block's first place to its last."""
    monkeypatch.setattr(module, "_BLOCK", 4)
    seen: list[tuple[int, int]] = []
    flash, near = module.flash, module.near

    def watched_near(rows: Tensor, k: Tensor, v: Tensor, ahead: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.append((0, k.shape[2]))
        return near(rows, k, v, ahead)

    def watched_flash(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen[-1] = (k.shape[2], seen[-1][1])
        return flash(rows, k, v)

    monkeypatch.setattr(module, "near", watched_near)
    monkeypatch.setattr(module, "flash", watched_flash)
    q, k, v = heads_of(1, 4, 2, torch.float32)
    indices = torch.tensor([[0, 3, 4, 9, 20, 21, 22, 23, 200]])
    merged_attention(indices, take_tokens(q, indices), k, v)
    assert seen == [(0, 10), (20, 4), (200, 1)]


@pytest.mark.parametrize("past", [0, 150])
def test_a_prefill_by_merged_attention_is_the_plain_one(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, past: int
) -> None:
    """From the start, and where the new tokens continue a cache."""
    ids = torch.randint(3, 256, (1, T), generator=torch.Generator().manual_seed(3))
    policy = FastKV(min_tokens=8)

    def run() -> prefill.Prefill:
        if not past:
            return tiny_llm.prefill(ids, policy)
        before = tiny_llm.prefill(ids[:, :past], policy, max_tokens=T)
        return tiny_llm.prefill(ids[:, past:], policy, cache=before.cache)

    expected, merged = run(), []

    def watched(*given: Tensor) -> Tensor:
        merged.append(given)
        return merged_attention(*given)

    monkeypatch.setattr(attention, "why_not_merged", lambda *_: None)
    monkeypatch.setattr(attention, "merged_attention", watched)
    found = run()
    assert len(merged) == (2 if past else 1)  # the TSP layer; the last layer's one query needs no mask
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found.kept, expected.kept, strict=True))


# --- where it runs ---


def test_a_sample_tells_whether_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert module._agrees_on_a_sample(4, 16, dtype, CPU)
        assert module._agrees_on_a_sample(1, 64, dtype, CPU)
    flash = module.flash

    def in_base_two(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        attended, sums = flash(rows, k, v)
        return attended, sums * 1.4427

    monkeypatch.setattr(module, "flash", in_base_two)
    assert not module._agrees_on_a_sample(4, 16, torch.float32, CPU)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError, NotImplementedError])
def test_without_the_kernel_there_is_a_reason_and_no_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def missing(*_: object) -> bool:
        raise error("no such kernel\nand a page of advice")

    why_not_merged.cache_clear()
    monkeypatch.setattr(module, "_agrees_on_a_sample", missing)
    device = torch.device("cuda")
    assert why_not_merged(4, 128, torch.bfloat16, device) == "no flash attention with log-sum-exps (no such kernel)"
    why_not_merged.cache_clear()
    monkeypatch.setattr(module, "_agrees_on_a_sample", lambda *_: False)
    assert why_not_merged(4, 128, torch.bfloat16, device) == "merging gives other results here"
    why_not_merged.cache_clear()
    monkeypatch.setattr(module, "_agrees_on_a_sample", lambda *_: True)
    assert why_not_merged(4, 128, torch.bfloat16, device) is None
    assert why_not_merged(4, 128, torch.bfloat16, CPU) is not None
    why_not_merged.cache_clear()


def test_a_gpu_takes_it_for_long_prompts_without_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def pays(device: str, n_tokens: int, window: int | None = None) -> bool:
        config = SimpleNamespace(n_heads=8, n_kv_heads=2, head_dim=128)
        model: Any = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device(device))
        return prefill._propagated_only_pays(cast(Llama, model), n_tokens, window)

    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(prefill, "why_not_merged", lambda *about: asked.append(about))
    assert pays("cuda", 65_536)
    assert asked == [(4, 128, torch.bfloat16, torch.device("cuda"))]
    assert not pays("cuda", 65_535)
    assert not pays("cuda", 100_000, window=4096)
    assert pays("cpu", 10, window=4)
    monkeypatch.setattr(prefill, "why_not_merged", lambda *_: "it does not work")
    assert not pays("cuda", 1_000_000)


def test_windows_and_single_queries_keep_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("not to be called")

    monkeypatch.setattr(attention, "why_not_merged", lambda *_: None)
    monkeypatch.setattr(attention, "merged_attention", refuse)
    q, k, v = heads_of(1, 4, 2, torch.float32)
    parts = [attention.Part(k, v)]
    for indices, window in ((torch.tensor([[5, 200]]), 64), (torch.tensor([[T - 1]]), None)):
        some = take_tokens(q, indices)
        found = attention.attend_parts(parts, some, window, indices, T)
        torch.testing.assert_close(found, attend_from(indices, some, k, v, window))
