"""How busy other programs kept the CPUs while something was measured: a figure is worth little where that is much."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class OtherLoad:
    """Begun when it is made. Counts all programs but this process and its children that have ended."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cpus(self) -> float | None:
        """CPUs that the others used since then, in the mean; None where the system does not say (only Linux does)."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / (time.perf_counter() - self._begun))


def _busy_seconds() -> float | None:
    """CPU seconds of all programs since the system began, and those that a host has kept from it."""
    try:
        ticks = [int(one) for one in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = ticks
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(os.times()[:4])
