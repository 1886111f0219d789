"""Products of queries and keys with float32 results, without a float32 copy of the keys where that can be.

Scores are float32: rounded to the 8 bits of bfloat16, many would be equal. A GPU multiplies short values into float32
ones; on a CPU torch cannot, and the values are copied.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def products(rows: Tensor, keys: Tensor) -> Tensor:
    """rows [B, H, m, D] times each of keys [B, H, n, D]: float32 [B, H, m, n]. The sums are float32, too."""
    if keys.dtype == torch.float32 or not has_float32_products(keys.dtype, keys.device):
        return rows.float() @ keys.float().transpose(-1, -2)
    return _multiplied(rows, keys)


def _multiplied(rows: Tensor, keys: Tensor) -> Tensor:
    """The same of short values, both in one dtype."""
    flat = torch.bmm(rows.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    return flat.unflatten(0, rows.shape[:2])


@functools.cache
def has_float32_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies values of a short dtype into float32 here. Tried once, on a small sample."""
    if device.type != "cuda":
        return False
    try:
        return _is_exact_on_a_sample(dtype, device)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


@torch.inference_mode()
def _is_exact_on_a_sample(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether sums come out that the short dtype could not hold, from keys with gaps between the heads."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.empty(1, 4, 5, 64, dtype=dtype, device=device).normal_(generator=generator)
    keys = torch.empty(1, 4, 48, 64, dtype=dtype, device=device).normal_(generator=generator)[:, :, 3:40]
    found, expected = _multiplied(rows, keys), rows.double() @ keys.double().transpose(-1, -2)
    return found.dtype == torch.float32 and bool((found - expected).abs().max() < 1e-3)
