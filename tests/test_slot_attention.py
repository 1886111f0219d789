"""Attention over slots of which only the device knows how many are live.

The varlen kernel needs a GPU. Here a slow function with its documented meaning stands in for it, so that what is handed
to it (sequences, starts, lengths) is checked; tests/gpu compares the kernel itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv.cache.storage import KVStorage
from fastkv.engine import slot_attention as module
from fastkv.engine.attention import decode_attention
from fastkv.engine.slot_attention import MaskedSlots, VarlenSlots, slot_attention


def storage_of(batch: int = 2, n_kv_heads: int = 2) -> KVStorage:
    torch.manual_seed(0)
    made = KVStorage.allocate([96, 64], batch, n_kv_heads, 8, dtype=torch.float32, device=torch.device("cpu"))
    for buffer in [*made.k, *made.v]:
        buffer.normal_()
    lengths = torch.tensor([[70, 2, 41], [33, 60, 0]])  # texts differ, and so do layers
    made.lengths.copy_(lengths[:, :batch].unsqueeze(2))
    return made


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


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("layer", [0, 1])
def test_masked_slots_attend_to_the_live_ones(layer: int, window: int | None) -> None:
    storage = storage_of()
    q = torch.randn(2, 6, 1, 8)
    attend = MaskedSlots(storage)
    attend.begin()
    found = attend(layer, q, 64 if layer else 96, window)
    for text in range(2):
        live = int(storage.lengths[layer, text, 0]) + 1
        slots = slice(0 if window is None else max(0, live - window), live)
        one = slice(text, text + 1)
        expected = decode_attention(q[one], storage.k[layer][one, :, slots], storage.v[layer][one, :, slots])
        torch.testing.assert_close(found[one], expected)


def varlen_without_lengths(*arguments: Any) -> Tensor:
    """As in a version of torch whose function does not take the lengths: the kernel below it does."""
    raise AssertionError("not to be called")


@pytest.mark.parametrize("function", [varlen, varlen_without_gqa_setting, varlen_without_lengths])
@pytest.mark.parametrize("batch", [1, 3])
def test_varlen_slots_attend_to_the_same(monkeypatch: pytest.MonkeyPatch, function: Any, batch: int) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    monkeypatch.setattr(module, "_flash_forward", varlen_without_gqa_setting)
    for heads in (2, 6):  # one and three query heads for each KV head
        storage = storage_of(batch)
        plain, fast = MaskedSlots(storage), VarlenSlots(storage)
        for step in range(3):  # lengths move on the device; nothing is baked in
            q = torch.randn(batch, heads, 1, 8)
            fast.begin()
            for layer, window in ((0, None), (1, None), (1, 7)):
                found = fast(layer, q, 96 if layer == 0 else 64, window)
                torch.testing.assert_close(found, plain(layer, q, 96 if layer == 0 else 64, window))
            storage.lengths.add_(step)


def test_the_choice_is_tried_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of()
    chosen, reason = slot_attention(storage, 4)
    assert isinstance(chosen, MaskedSlots)
    assert reason == "varlen attention runs on a GPU"

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    assert module._agree_on_a_sample(storage, 4)

    def blind(*arguments: Any, seqused_k: Tensor, enable_gqa: bool) -> Tensor:
        """Attends to one dead slot, too."""
        return varlen(*arguments, seqused_k=seqused_k + 1, enable_gqa=enable_gqa)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", blind)
    assert not module._agree_on_a_sample(storage, 4)
