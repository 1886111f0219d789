"""Products with float32 results: the way that copies to float32, and the way that torch has on a GPU alone.

A function with that operator's meaning stands in for it here, so that what is handed to it is checked.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkv.cache import scores
from fastkv.cache.scores import last_query_scores, received_attention, window_attention
from fastkv.engine.merged_attention import merged_attention
from fastkv.kernels import key_products as module
from fastkv.kernels.key_products import has_float32_products, products

GPU = torch.device("cuda")
Work = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of keys that went into torch's operator, as on a GPU."""
    seen: list[torch.Size] = []

    def bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert a.dim() == b.dim() == 3
        assert a.dtype == b.dtype == torch.bfloat16
        assert out_dtype == torch.float32
        seen.append(b.shape)
        return torch.einsum("bmd,bdn->bmn", a.float(), b.float())

    monkeypatch.setattr(torch, "bmm", bmm)
    for where in (module, scores):
        monkeypatch.setattr(where, "has_float32_products", lambda *_: True)
    return seen


def heads_of(batch: int) -> tuple[Tensor, Tensor]:
    """q [B, 6, 50, 16] and k [B, 2, 50, 16], which are parts of one memory, as in a prefill."""
    torch.manual_seed(batch)
    q, k, _ = torch.randn(batch, 10, 50, 16).bfloat16().split((6, 2, 2), dim=1)
    return q, k


def merged(q: Tensor, k: Tensor) -> Tensor:
    return merged_attention(torch.arange(3, 50, 2).repeat(len(q), 1), q[:, :, 3::2], k, k)


WORK: dict[str, Work] = {
    "products": lambda q, k: products(q[:, :2], k),
    "window": lambda q, k: window_attention(q, k, 8),
    "received": received_attention,
    "last query": lambda q, k: last_query_scores(q, k, 5),
    "merged": merged,
}


@pytest.mark.parametrize("work", WORK.values(), ids=list(WORK))
@pytest.mark.parametrize("batch", [1, 2])
def test_keys_are_multiplied_as_they_are_and_give_the_same(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch, work: Work, batch: int
) -> None:
    q, k = heads_of(batch)
    found = work(q, k)
    assert calls, "the keys were copied"
    assert all(shape[0] == 2 * batch for shape in calls)
    count = len(calls)
    torch.testing.assert_close(found, work(q.float(), k.float()).to(found.dtype), atol=1e-2, rtol=1e-2)
    assert len(calls) == count, "float32 needs no operator of its own"
    for where in (module, scores):
        monkeypatch.setattr(where, "has_float32_products", lambda *_: False)
    copied = work(q, k)
    assert len(calls) == count
    torch.testing.assert_close(found, copied, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_those_of_float32(dtype: torch.dtype) -> None:
    """Not rounded to the short dtype on the way."""
    torch.manual_seed(0)
    rows, keys = torch.randn(2, 3, 7, 64).to(dtype), torch.randn(2, 3, 20, 64).to(dtype)
    found = products(rows, keys)
    assert found.dtype == torch.float32
    expected = torch.einsum("bhmd,bhnd->bhmn", rows.double(), keys.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_sample_tells_whether_sums_are_rounded(monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]) -> None:
    cpu = torch.device("cpu")
    assert module._is_exact_on_a_sample(torch.bfloat16, cpu)
    assert calls == [(4, 64, 37)]
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: torch.matmul(a, b).to(out_dtype))
    assert not module._is_exact_on_a_sample(torch.bfloat16, cpu)
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: torch.matmul(a.double(), b.double()))
    assert not module._is_exact_on_a_sample(torch.bfloat16, cpu)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError, TypeError])
def test_without_the_operator_keys_are_copied(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def missing(*_: object) -> bool:
        raise error("no such operator")

    has_float32_products.cache_clear()
    monkeypatch.setattr(module, "_is_exact_on_a_sample", missing)
    assert not has_float32_products(torch.bfloat16, GPU)
    has_float32_products.cache_clear()
    monkeypatch.setattr(module, "_is_exact_on_a_sample", lambda *_: True)
    assert has_float32_products(torch.bfloat16, GPU)
    assert not has_float32_products(torch.bfloat16, torch.device("cpu"))
    has_float32_products.cache_clear()
