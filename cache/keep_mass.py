"""How few entries hold a share of a mass: the budget of a layer, found when its scores are known.

Which entries a number keeps is a policy's own matter, and need not be the same with one more; so numbers are tried.
What is found holds the share, and where more entries never hold less it is the smallest number that does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smallest(enough: Callable[[int], bool], least: int, most: int) -> int:
    """The smallest number from `least` to `most` that is enough; `most` if none is."""
    while least < most:
        middle = (least + most) // 2
        if enough(middle):
            most = middle
        else:
            least = middle + 1
    return least


def smallest_of_each(held: Callable[[Tensor], Tensor], wanted: Tensor, least: int, most: int) -> Tensor:
    """As `smallest` for each head by itself: int64 [B, Hkv].

    held: takes numbers of entries, int64 [B, Hkv], and gives what these hold, [B, Hkv]. wanted: [B, Hkv].
    """
    low = torch.full(wanted.shape, least, dtype=torch.int64, device=wanted.device)
    high = torch.full_like(low, most)
    for _ in range((most - least).bit_length()):
        middle = (low + high) // 2
        enough = held(middle) >= wanted
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1).minimum(high)
    return high


def norm_counts(attention: Tensor, sinks: int, drop: float, uncounted: int = 0) -> Tensor:
    """How many entries leave less than `drop` of the length of an attention row to the rest: int64 [B, Hkv].

    attention: [B, Hkv, T]. The first `sinks` entries are taken first, the others from the last one backwards; of the
    first i of them, the smallest i with 1 - |a_1 ... a_i| / |a| < drop (arXiv 2502.16886). uncounted: the first entries
    whose attention is taken for 0; where nothing is left of a row, that is 1.
    """
    counted = attention.double().square()
    counted[..., :uncounted] = 0
    in_order = torch.cat((counted[..., :sinks], counted[..., sinks:].flip(-1)), dim=-1)
    lengths = in_order.cumsum(dim=-1).sqrt()
    return (lengths[..., -1:] - lengths >= drop * lengths[..., -1:].clamp_min(1e-300)).sum(dim=-1) + 1
