"""CriticalAdaKV: CriticalKV's two halves, inside heads that compete for the budget (arXiv 2502.03805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policies.adakv import AdaKV
from fastkv.cache.policies.criticalkv import CriticalKV


@dataclass(frozen=True, kw_only=True)
class CriticalAdaKV(CriticalKV, AdaKV):
    """AdaKV says how many entries each KV head keeps, CriticalKV which ones.

    kv_retention, kv_len, min_tokens: the MEAN budget of a layer's heads. head_floor is AdaKV's, norm is CriticalKV's,
    and the others are SnapKV's. What differs from the paper stands in these classes. Raises FastKVError for a value out
    of range.
    """

    name: ClassVar[str] = "criticaladakv"
