"""One line on a terminal: how far a run is, how long it still takes, and how the policies stand."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TextIO

from fastkv.eval.results import Record

_INTERVAL = 0.1  # seconds between two updates


class ProgressLine:
    """`show` is told of every record. Silent unless `stream` is a terminal."""

    def __init__(self, stream: TextIO | None, done_before: int = 0) -> None:
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._before = done_before
        self._started = self._shown_at = time.monotonic()
        self._scores: dict[str, list[float]] = defaultdict(list)

    def show(self, record: Record, done: int, total: int) -> None:
        self._scores[record.policy].append(record.score)
        now = time.monotonic()
        if self._stream is None or not self._live or now - self._shown_at < _INTERVAL:
            return
        left = (now - self._started) * (total - done) / (done - self._before)
        self._write(f"{done} of {total}, {clock(left)} left   {self._standings()}")
        self._shown_at = now

    def clear(self) -> None:
        if self._live:
            self._write("")

    def _standings(self) -> str:
        means = ((label, 100 * sum(scores) / len(scores)) for label, scores in self._scores.items())
        return ", ".join(f"{label} {mean:.1f} %" for label, mean in means)

    def _write(self, text: str) -> None:
        if self._stream is not None:
            import shutil

            # A line that wraps could not be taken back.
            self._stream.write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            self._stream.flush()


def clock(seconds: float) -> str:
    """Seconds as `45 s`, `3:07 min` or `2:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
