"""Attention of one new token over the slots of a storage, where only the device knows how many of them are live.

What a captured decode step needs: no length is baked in, and nothing waits for the host. `MaskedSlots` is plain and
runs anywhere; `VarlenSlots` is the fast one, on a GPU; a test holds them together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.storage import KVStorage
from fastkv.engine.attention import without_cudnn


class SlotAttention(Protocol):
    """Attends over a head's first `span` slots, of which lengths[layer] + 1 are live, the new tokens among them."""

    def begin(self) -> None:
        """Once a step, before the first layer."""

    def __call__(self, layer: int, q: Tensor, span: int, window: int | None) -> Tensor:
        """q [B, Hq, 1, D] -> [B, Hq, 1, D]. window: of the live slots only the last so many (None: all)."""


class MaskedSlots:
    """Every slot of the span is multiplied, and a mask hides what is not live.

    ragged: heads may begin anywhere, so that their slots are copied together first, `span` of them for each head: with
    heads that may take all of a layer's slots, as many times the layer as it has heads.
    """

    def __init__(self, storage: KVStorage, ragged: bool = False) -> None:
        self._storage = storage
        self._ragged = ragged

    def begin(self) -> None:
        pass

    def __call__(self, layer: int, q: Tensor, span: int, window: int | None) -> Tensor:
        k, v = self._slots(layer, span)
        last = self._storage.lengths[layer][:, :, None, None]
        slots = torch.arange(span, device=q.device)
        visible = slots <= last  # [B, Hkv, 1, span]
        if window is not None:
            visible &= slots > last - window
        rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]: the queries of a KV head side by side
        with without_cudnn(q.device):
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=visible).flatten(1, 2).unsqueeze(2)

    def _slots(self, layer: int, span: int) -> tuple[Tensor, Tensor]:
        """The first `span` slots of each head: [B, Hkv, span, D]."""
        if not self._ragged:
            return self._storage.k[layer][:, :, :span], self._storage.v[layer][:, :, :span]
        flat_k, flat_v = self._storage.flat(layer)
        slots = self._storage.starts[layer].unsqueeze(2) + torch.arange(span, device=flat_k.device)
        rows = slots.clamp_max(flat_k.shape[1] - 1).flatten(1)  # what lies beyond a head's own slots is not visible
        index = rows.unsqueeze(2).expand(-1, -1, flat_k.shape[2])
        return flat_k.gather(1, index).unflatten(1, slots.shape[1:]), flat_v.gather(1, index).unflatten(
            1, slots.shape[1:]
        )


class VarlenSlots:
    """Flash attention for sequences of different lengths (torch.nn.attention.varlen).

    Each KV head of each text is a sequence of its own, with one token of G query heads and one key head: so the slots
    need no copy, heads may differ in length, and the kernel splits a long sequence over the GPU. Layers with a sliding
    window are left to MaskedSlots, for which `ragged` is.
    """

    def __init__(self, storage: KVStorage, ragged: bool = False) -> None:
        self._attend = _varlen_function()
        self._storage = storage
        n_layers, batch, n_kv_heads = storage.lengths.shape
        device, integer = storage.k[0].device, torch.int32
        self._starts = torch.arange(batch * n_kv_heads + 1, dtype=integer, device=device)
        # Where each text's slots begin, of all that a layer has, and where the last one's end: [L, B + 1]
        capacities = torch.tensor(storage.capacities, dtype=integer, device=device)
        self._texts = torch.arange(batch + 1, dtype=integer, device=device) * (n_kv_heads * capacities).unsqueeze(1)
        self._starts_of_slots = torch.zeros(n_layers, batch * n_kv_heads + 1, dtype=integer, device=device)
        self._starts_of_slots[:, -1] = self._texts[:, -1]
        self._live = torch.zeros(n_layers, batch * n_kv_heads, dtype=integer, device=device)
        self._masked = MaskedSlots(storage, ragged)

    def begin(self) -> None:
        per_head = self._storage.lengths.shape  # [L, B, Hkv]
        self._live.view(per_head).copy_(self._storage.lengths).add_(1)
        starts = self._starts_of_slots[:, :-1].unflatten(1, per_head[1:])
        starts.copy_(self._storage.starts).add_(self._texts[:, :-1].unsqueeze(2))

    def __call__(self, layer: int, q: Tensor, span: int, window: int | None) -> Tensor:
        if window is not None:
            return self._masked(layer, q, span, window)
        k, v = self._storage.k[layer], self._storage.v[layer]
        head_dim = q.shape[-1]
        attended = self._attend(
            q.reshape(k.shape[0] * k.shape[1], -1, head_dim),  # [B * Hkv, G, D]
            k.view(-1, 1, head_dim),  # [B * Hkv * C, 1, D]
            v.view(-1, 1, head_dim),
            self._starts,
            self._starts_of_slots[layer],
            1,
            span,
            seqused_k=self._live[layer],
        )
        return attended.view(q.shape)


def _varlen_function() -> Callable[..., Any]:
    """torch's varlen attention, in the form that this version has: with `seqused_k`, for grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _flash_forward
    known = inspect.signature(varlen_attn).parameters
    if "seqused_k" not in known:  # before 2.12; the kernel below it has had it for longer
        return _flash_forward
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_of_keys: Tensor, max_q: int, max_k: int, seqused_k: Tensor
) -> Tensor:
    """The kernel itself, no dropout and no mask."""
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, starts, starts_of_keys, max_q, max_k, 0.0, False, False, seqused_k=seqused_k)[0]


def slot_attention(storage: KVStorage, n_heads: int, ragged: bool = False) -> tuple[SlotAttention, str | None]:
    """The faster of the two that works here, and why it is not VarlenSlots (None: it is). ragged: heads may differ.

    Versions of torch and devices differ in what varlen attention takes, so it is tried: on a small storage of the same
    kind, against the plain one.
    """
    buffer = storage.k[0]
    if buffer.device.type != "cuda":
        return MaskedSlots(storage, ragged), "varlen attention runs on a GPU"
    if buffer.dtype == torch.float32:
        return MaskedSlots(storage, ragged), "varlen attention computes in bfloat16 or float16"
    try:
        if not _agree_on_a_sample(storage, n_heads):
            return MaskedSlots(storage, ragged), "varlen attention gives other results here"
        return VarlenSlots(storage, ragged), None
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return MaskedSlots(storage, ragged), f"no varlen attention ({str(error).splitlines()[0]})"


@torch.inference_mode()
def _agree_on_a_sample(storage: KVStorage, n_heads: int) -> bool:
    """Whether both attentions give the same for a sample whose dead slots would be noticed."""
    _, n_kv_heads, _, head_dim = storage.k[0].shape
    dtype, device = storage.k[0].dtype, storage.k[0].device
    sample = KVStorage.allocate([96], storage.batch, n_kv_heads, head_dim, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for buffer in (sample.k[0], sample.v[0]):
        buffer.normal_(generator=generator)
    sample.lengths.fill_(40)
    q = torch.empty(storage.batch, n_heads, 1, head_dim, dtype=dtype, device=device).normal_(generator=generator)
    varlen = VarlenSlots(sample)
    varlen.begin()
    difference = varlen(0, q, 64, None) - MaskedSlots(sample)(0, q, 64, None)
    return bool(difference.abs().max() < 0.05)  # values are about 1 / sqrt(41); a dead slot too many shows at 0.1
