"""What a decode step of a policy reads of the cache, before there is any: its plan and its indices tell.

An index is asked about keys that are all zero: how much it reads, and how much of itself, does not depend on the keys.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean

import torch

from fastkv.cache.layer import EntryShape
from fastkv.cache.policies.read_few import ReadByBudget
from fastkv.cache.policy import Policy, plan_layers
from fastkv.cache.reader import IndexSizes

STEPS = 1000  # values of read_retention from 0 to 1 that are tried
_CPU = torch.device("cpu")


def read_share(policy: Policy, n_layers: int, n_tokens: int, shape: EntryShape) -> float:
    """K, V and indices that the first step after a prompt reads, as a share of the prompt's K and V in a full cache.

    Its own entry is not counted. shape: of a layer's entries.
    """
    known: dict[int, float] = {}  # layers that choose among as many are alike
    read = 0.0
    for layer, plan in enumerate(plan_layers(policy, n_layers, n_tokens)):
        if not policy.reads_few(layer, plan.kept + 1, n_tokens + 1):
            read += plan.kept * shape.n_kv_heads
            continue
        if plan.kept not in known:
            known[plan.kept] = _chosen(policy, layer, plan.kept, n_tokens, shape)
        read += known[plan.kept]
    return read / (n_layers * n_tokens * shape.n_kv_heads)


def nearest_read(policy: ReadByBudget, share: float, n_layers: int, lengths: Sequence[int], shape: EntryShape) -> float:
    """The read_retention with which a step reads most nearly `share`, in the mean over the lengths."""

    def off(step: int) -> float:
        changed = dataclasses.replace(policy, read_retention=step / STEPS)
        return fmean(read_share(changed, n_layers, length, shape) for length in lengths) - share

    high = bisect_left(range(STEPS), True, lo=2, key=lambda step: off(step) >= 0)
    return min(high - 1, high, key=lambda step: abs(off(step))) / STEPS


def _chosen(policy: Policy, layer: int, kept: int, n_tokens: int, shape: EntryShape) -> float:
    """Of a layer that chooses, in entries of one head: what is read of an index counts as its bytes do."""
    of_keys = (1, shape.n_kv_heads, shape.head_dim, shape.dtype)
    index = policy.index(layer, IndexSizes(*of_keys, kept, kept + 1, policy.read_budget(n_tokens)), _CPU)
    keys = torch.zeros(1, shape.n_kv_heads, kept + 1, shape.head_dim, dtype=shape.dtype)
    for count in (kept, kept + 1):  # as a prefill learns, then a step
        if index.due(count):
            index.learn(keys[:, :, :count])
    chosen = index.choose(keys[:, :, -1:], kept + 1, policy.read_budget(n_tokens + 1))
    if chosen is None:
        return kept * shape.n_kv_heads
    entry_bytes = 2 * shape.head_dim * shape.dtype.itemsize
    return chosen.numel() - shape.n_kv_heads + index.read_bytes / entry_bytes
