"""FastKV as published: the scores of the paper itself (arXiv 2502.01068), for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policies.fastkv import PAPER, FastKV
from fastkv.cache.setting import redefined


@dataclass(frozen=True, kw_only=True)
class FastKVPaper(FastKV):
    """FastKV with other defaults, those of `FastKV.paper()`; every setting is FastKV's.

    Agrees with the paper's own implementation entry by entry (tests/test_reference.py).
    """

    name: ClassVar[str] = "fastkv-paper"
    scores_on_host: ClassVar[bool] = True

    window: int = redefined(FastKV, "window", PAPER["window"])
    tsp_window: int = redefined(FastKV, "tsp_window", PAPER["tsp_window"])
    queries: str = redefined(FastKV, "queries", PAPER["queries"])
    pooling: str = redefined(FastKV, "pooling", PAPER["pooling"])
    kernel: int = redefined(FastKV, "kernel", PAPER["kernel"])
    values: bool = redefined(FastKV, "values", PAPER["values"])
    sinks: int = redefined(FastKV, "sinks", PAPER["sinks"])
    share: float = redefined(FastKV, "share", PAPER["share"])
    narrow: float = redefined(FastKV, "narrow", PAPER["narrow"])
