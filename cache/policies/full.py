"""FullKV: every layer sees and keeps every token; the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policy import Policy


@dataclass(frozen=True, kw_only=True)
class FullKV(Policy):
    """Keeps everything."""

    name: ClassVar[str] = "full"
    scores_on_host: ClassVar[bool] = True
