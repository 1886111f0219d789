"""FastKV as published: the scores of the paper itself (arXiv 2502.01068), for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policies.compressed import (
    POOLING_HELP,
    QUERIES_HELP,
    SHARE_HELP,
    SINKS_HELP,
    VALUES_HELP,
    WINDOW_HELP,
)
from fastkv.cache.policies.fastkv import PAPER, FastKV
from fastkv.cache.setting import choice, number, setting, switch, whole


@dataclass(frozen=True, kw_only=True)
class FastKVPaper(FastKV):
    """FastKV with other defaults, those of `FastKV.paper()`; every setting is FastKV's.

    Agrees with the paper's own implementation entry by entry (tests/test_reference.py).
    """

    name: ClassVar[str] = "fastkv-paper"

    window: int = setting(PAPER["window"], whole(1), WINDOW_HELP, metavar="W")
    queries: str = setting(PAPER["queries"], choice("sum", "max"), QUERIES_HELP, metavar="sum|max")
    pooling: str = setting(PAPER["pooling"], choice("max", "avg", "forward"), POOLING_HELP, metavar="max|avg|forward")
    values: bool = setting(PAPER["values"], switch(), VALUES_HELP, metavar="yes|no")
    sinks: int = setting(PAPER["sinks"], whole(0), SINKS_HELP, metavar="N")
    share: float = setting(PAPER["share"], number(0), SHARE_HELP, metavar="R")
