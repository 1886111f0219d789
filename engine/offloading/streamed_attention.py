"""Attention of some queries to keys that come a block at a time, and are gone again: softmax needs no more.

Each block gives what the queries attend to in it, and its log-sum-exps, which say how much that weighs against what
they have so far (the recurrence of arXiv 2205.14135 over blocks). Knows nothing of where blocks come from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkv.engine.merged_attention import LOWEST, flash, has_sums, near

# Keys that stand under a mask at a time: what a mask hides is computed for nothing, and so few are.
MASKED_KEYS = 1024
# Float32 logits that are held at a time, where attention is plain products (256 MiB, and half of that for weights).
LOGITS = 2**26


class Places(NamedTuple):
    """Where queries stand among the keys. indices: int64 [B or 1, n] on the device, ascending. firsts, lasts: of each
    query, its first and last place in any sequence, on the host.
    """

    indices: Tensor
    firsts: Sequence[int]
    lasts: Sequence[int]

    @classmethod
    def of_range(cls, start: int, end: int, device: torch.device) -> Places:
        """Of neighbours."""
        return cls(torch.arange(start, end, device=device).unsqueeze(0), range(start, end), range(start, end))

    @classmethod
    def of(cls, indices: Tensor, on_host: Tensor) -> Places:
        """Of chosen ones: the same indices [B, n] on the device and on the host."""
        return cls(indices, on_host.amin(0).tolist(), on_host.amax(0).tolist())


class StreamedAttention:
    """Causal attention of q [B, Hq, n, D] to the keys of `n_kv_heads` heads: `see` each block once, then `result`.

    window: of the keys up to its own a query sees the nearest (None: all).
    """

    def __init__(self, q: Tensor, places: Places, n_kv_heads: int, window: int | None = None) -> None:
        self._q = q.unflatten(1, (n_kv_heads, -1))  # [B, Hkv, G, n, D]
        self._places, self._window = places, window
        shape = self._q.shape
        self._attended = torch.zeros(shape, dtype=torch.float32, device=q.device)
        self._sums = torch.full(shape[:-1], LOWEST, dtype=torch.float32, device=q.device)
        self._has_sums = has_sums(shape[2], shape[-1], q.dtype, q.device)

    def see(self, first: int, k: Tensor, v: Tensor) -> None:
        """Attend to the keys at first … first + s - 1: k and v [B, Hkv, s, D]."""
        count = k.shape[2]
        spans = list(visible_spans(self._places, first, first + count, self._window))
        if count > MASKED_KEYS and any(masked for _, _, masked in spans):
            for start in range(0, count, MASKED_KEYS):
                part = slice(start, start + MASKED_KEYS)
                self.see(first + start, k[:, :, part], v[:, :, part])
            return
        for start, end, masked in spans:
            self._attend(start, end, masked, first, k, v)

    def result(self) -> Tensor:
        """[B, Hq, n, D], in the dtype of the queries."""
        return self._attended.to(self._q.dtype).flatten(1, 2)

    def _attend(self, start: int, end: int, masked: bool, first: int, k: Tensor, v: Tensor) -> None:
        """Queries start … end - 1, which see some of these keys, or all of them (not masked)."""
        plain = masked or not self._has_sums
        at_a_time = queries_at_a_time(self._q.shape, k.shape[2]) if plain else end - start
        for begin in range(start, end, at_a_time):
            stop = min(begin + at_a_time, end)
            # The queries of a KV head's group are the rows of one product: K and V are never repeated.
            rows = self._q[:, :, :, begin:stop].flatten(2, 3)
            if plain:
                self._merge(begin, stop, *near(rows, k, v, self._hidden(begin, stop, first, k) if masked else None))
            else:
                self._merge(begin, stop, *flash(rows, k, v))

    def _hidden(self, start: int, end: int, first: int, k: Tensor) -> Tensor:
        """Which keys queries start … end - 1 do not see: bool [B or 1, n, s]."""
        places = self._places.indices[:, start:end].unsqueeze(-1)
        keys = torch.arange(first, first + k.shape[2], device=k.device)
        ahead = keys > places
        return ahead if self._window is None else ahead | (keys <= places - self._window)

    def _merge(self, start: int, end: int, attended: Tensor, sums: Tensor) -> None:
        """What queries start … end - 1 find in a block, [B, Hkv, G * n, D], with its log-sum-exps."""
        part = (slice(None), slice(None), slice(None), slice(start, end))
        so_far = self._sums[part]
        sums = sums.view(so_far.shape)
        share = torch.sigmoid(sums - so_far).unsqueeze(-1)
        self._attended[part].lerp_(attended.view(*so_far.shape, -1).float(), share)
        so_far.copy_(torch.logaddexp(so_far, sums))


def visible_spans(places: Places, first: int, end: int, window: int | None) -> Iterator[tuple[int, int, bool]]:
    """(start, end, masked) of the queries that see any of the keys first … end - 1; masked: not all of them.

    A query at place p sees the keys from p - window + 1 to p.
    """
    n_queries = len(places.firsts)
    begin, sees_last = bisect_left(places.lasts, first), bisect_left(places.firsts, end - 1)
    stop = leaves_first = n_queries
    if window is not None:
        stop = bisect_left(places.firsts, end - 1 + window)
        leaves_first = bisect_left(places.lasts, first + window)
    whole = min(max(begin, sees_last), stop)
    rest = min(max(whole, leaves_first), stop)
    for start, until, masked in ((begin, whole, True), (whole, rest, False), (rest, stop, True)):
        if start < until:
            yield start, until, masked


def queries_at_a_time(shape: Sequence[int], n_keys: int) -> int:
    """Queries whose logits of so many keys are held at a time, of q [B, Hkv, G, n, D]."""
    batch, n_kv_heads, group = shape[:3]
    return max(1, LOGITS // (batch * n_kv_heads * group * n_keys))
