"""From scores to indices: which tokens stay. Indices count within the tokens that a layer saw, ascending."""

from __future__ import annotations

import torch
from torch import Tensor


def select_entries(scores: Tensor, count: int, window: int) -> Tensor:
    """The `count` tokens that each KV head keeps: its best-scored ones and the last `window`.

    scores: [B, Hkv, T - window]; window <= count < T. Returns int64 [B, Hkv, count].
    """
    return _best_and_window(scores, count, window)


def select_tokens(scores: Tensor, count: int, window: int) -> Tensor:
    """The `count` tokens that go on to later layers: the best by the sum over KV heads, and the last `window`.

    scores: [B, Hkv, T - window]; window <= count < T. Returns int64 [B, count].
    """
    return _best_and_window(scores.sum(dim=1), count, window)


def _best_and_window(scores: Tensor, count: int, window: int) -> Tensor:
    # Exactly topk over the columns in front of the window: pooling makes ties, and this is how they fall in the
    # paper's implementation on the same device.
    best = scores.topk(count - window, dim=-1).indices
    before = scores.shape[-1]
    recent = torch.arange(before, before + window, device=scores.device).expand(*best.shape[:-1], window)
    return torch.cat((best.sort(dim=-1).values, recent), dim=-1)
