"""Causal attention by kernels that only a GPU has: what is handed to them, and what comes back. A CPU stands in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv import LLM, FullKV
from fastkv.engine import attention as module
from fastkv.engine.attention import AUTO, causal_attention
from fastkv.kernels import row_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what the kernel is given, which is a CPU's in place of cuDNN."""
    seen: list[int] = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert all(heads.isfinite().all() for heads in (q, k, v))
        seen.append(q.shape[2])
        return attend(q, k, v, **more)

    monkeypatch.setattr(module, "sdpa_kernel", lambda *_, **__: nullcontext())
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


def heads_of(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """In memory that holds NaN after the tokens, as memory may that was used before."""
    torch.manual_seed(n_tokens)
    heads = torch.randn(2, 8, n_tokens + 40, 8)
    heads[:, :, n_tokens:] = torch.nan
    q, k, v = heads[:, :, :n_tokens].split((4, 2, 2), dim=1)
    return q, k, v


@pytest.mark.parametrize("n_tokens", [1, 30, 63, 64, 65, 128, 150])
def test_tokens_after_the_last_change_nothing(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], n_tokens: int
) -> None:
    """cuDNN prepares itself for every length, so it only gets lengths that come again."""
    monkeypatch.setattr(module, "_LENGTHS", 64)
    q, k, v = heads_of(n_tokens)
    found, expected = (causal_attention(q, k, v, backend=backend) for backend in ("cudnn", "flash"))
    assert lengths == [-(-n_tokens // 64) * 64, n_tokens]
    assert found.shape == expected.shape == q.shape
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 7, 39, 500])
@pytest.mark.parametrize("n_new", [2, 3, 16, 17])
def test_the_last_queries_attend_as_one_after_another(n_new: int, window: int | None) -> None:
    """A few at once, as judged drafts are, and more than those."""
    q, k, v = heads_of(60)
    found = module.attend_last(q[:, :, -n_new:], k, v, window)
    each = [
        module.attend_last(q[:, :, end - 1 : end], k[:, :, :end], v[:, :, :end], window)
        for end in range(61 - n_new, 61)
    ]
    torch.testing.assert_close(found, torch.cat(each, dim=2), atol=1e-6, rtol=1e-5)


def test_what_has_its_length_or_is_long_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LENGTHS", 64)
    monkeypatch.setattr(module, "_PADDED_BELOW", 500)
    for n_tokens in (64, 448, 500, 555):
        for heads in heads_of(n_tokens):
            assert module._padded(heads) is heads
    assert module._padded(heads_of(499)[0]).shape[2] == 512


def test_padding_is_for_cudnn_alone() -> None:
    asked = [
        (AUTO, 8192, torch.bfloat16, GPU),
        (AUTO, 8192, torch.float16, GPU),
        ("cudnn", 5, torch.bfloat16, GPU),
        (AUTO, 8191, torch.bfloat16, GPU),
        (AUTO, 50_000, torch.float32, GPU),
        ("flash", 50_000, torch.bfloat16, GPU),
        (AUTO, 50_000, torch.bfloat16, CPU),
    ]
    assert [module._by_cudnn(*each) for each in asked] == [True] * 3 + [False] * 4


def test_a_cudnn_that_fails_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt goes on with other kernels, and one line says so. What the user chose by name fails as before."""
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in range(3))
    attend, asked = F.scaled_dot_product_attention, []

    def failing(*heads: Tensor, **more: Any) -> Tensor:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("cuDNN Frontend error: no valid plan\nand more")
        return attend(*heads, **more)

    monkeypatch.setattr(module, "sdpa_kernel", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module, "_cudnn_works", True)
    monkeypatch.setattr(module, "_by_cudnn", lambda backend, *_: backend == "cudnn" or module._cudnn_works)
    monkeypatch.setattr(F, "scaled_dot_product_attention", failing)
    with pytest.raises(RuntimeError, match="no valid plan"):
        module._chosen_kernels(q, k, v, "cudnn")
    asked.clear()
    found = module._chosen_kernels(q, k, v, AUTO)
    torch.testing.assert_close(found, attend(q, k, v, is_causal=True), atol=1e-5, rtol=1e-5)
    assert len(asked) == 2
    assert [record.message for record in caplog.records] == [
        "attention goes on without cuDNN, which failed: cuDNN Frontend error: no valid plan"
    ]
    module._chosen_kernels(q, k, v, AUTO)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("windows", [[None] * 6, [None, 20] * 3], ids=["alike", "taking turns"])
def test_the_mask_of_a_step_is_made_once(
    tiny_llm: LLM, windows: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few tokens, for all layers that hold as many entries; and it is the one that each layer needs."""
    cache = tiny_llm.prefill(list(range(3, 63)), FullKV(), max_tokens=20).cache
    monkeypatch.setattr(type(tiny_llm.config), "windows", property(lambda _: tuple(windows)))
    ids, made, real = torch.tensor([[5, 6, 7, 8]]), [], row_attention.causal_mask
    monkeypatch.setattr(row_attention, "causal_mask", lambda *of: made.append(of[1]) or real(*of))
    together = tiny_llm.decode(cache, ids)
    assert made == [64] + [20 + 3] * (windows[1] is not None)  # where only the nearest are looked at
    cache.truncate(4)
    one_by_one = torch.stack([tiny_llm.decode(cache, ids[:, place]) for place in range(4)], dim=1)
    torch.testing.assert_close(together, one_by_one, atol=1e-4, rtol=1e-4)
