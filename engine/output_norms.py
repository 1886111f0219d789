"""How much values change the hidden states: their length after the output projection (arXiv 2502.03805)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkv.models.block import Attention

# Values that are held at a time. Not measured.
_CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**26}


def output_norms(attention: Attention, x: Tensor, norm: str) -> Tensor:
    """|W_h x| for the part W_h of the output projection that reads query head h: float32 [B, Hkv, G, n].

    x: [B, Hkv, 1 or G, n, D]. norm: "l1", the sum of the absolute values, for which W_h x is computed, as much work as
    the projection of n tokens; or "l2", the root of x^T (W_h^T W_h) x, in which only D values of a head take part.
    """
    chunk = _length_by_gram if norm == "l2" else _sum_of_outputs
    n_heads, _, _ = attention.heads
    width = attention.head_dim if norm == "l2" else attention.o_proj.out_features
    at_a_time = tokens_at_a_time(x.shape[0] * n_heads * width, x.device)
    return torch.cat([chunk(attention, part) for part in x.split(at_a_time, dim=3)], dim=-1)


def tokens_at_a_time(width: int, device: torch.device) -> int:
    """How many tokens are held, each of so many values."""
    return max(1, _CHUNK_VALUES[device.type] // width)


def _length_by_gram(attention: Attention, x: Tensor) -> Tensor:
    gram = attention.output_gram().unflatten(0, (x.shape[1], -1))  # [Hkv, G, D, D]
    x = x.float()
    return ((x @ gram) * x).sum(dim=-1).clamp_min(0).sqrt()


def _sum_of_outputs(attention: Attention, x: Tensor) -> Tensor:
    weight = attention.o_proj.dense()
    heads = weight.t().unflatten(0, (x.shape[1], -1, attention.head_dim))  # [Hkv, G, D, E]
    return (x.to(weight.dtype) @ heads).abs().sum(dim=-1, dtype=torch.float32)
