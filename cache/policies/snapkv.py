"""SnapKV: every layer keeps what the last tokens of the prompt attend to (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policies.window_scored import WindowScored


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowScored):
    """KV compression alone: all tokens pass all layers, and each layer keeps its best-scored entries.

    kv_retention, kv_len, min_tokens: the budget of a layer. window, kernel, pooling: the scores. All as in FastKV, of
    which this is the half without TSP.

    What differs from the paper: it sums the scores over the query heads of a KV head, because the cache holds KV heads
    only; and the defaults of window and kernel are FastKV's. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "snapkv"
    compresses_again: ClassVar[bool] = True
    scores_on_host: ClassVar[bool] = True
