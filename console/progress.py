"""One line on a terminal that says how far something long has come, and how long it still takes."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from typing import TextIO

_PATIENCE = 1.0  # seconds before a line appears: what is short shows none
_INTERVAL = 0.1  # seconds between two updates


_on_screen: ProgressLine | None = None


def clear_line() -> None:
    """Take back the line that stands on the terminal, if there is one: something else is to be written there."""
    if _on_screen is not None:
        _on_screen.clear()


class ProgressLine:
    """A context manager, at whose end the line is gone. Silent unless `stream` is a terminal.

    done: what had been done before, for which no time of this run was spent.
    """

    def __init__(self, stream: TextIO | None, done: int = 0) -> None:
        self._stream = stream if stream is not None and stream.isatty() else None
        self._began, self._done_before = time.monotonic(), done
        self._next = self._began + _PATIENCE

    def show(self, text: str, done: int, total: int, note: str = "") -> None:
        """Show `text`, the time left and a note. Where `done` is 0, the time is counted from here."""
        now = time.monotonic()
        if done == 0:
            self._began, self._done_before = now, 0
        if self._stream is None or now < self._next:
            return
        fresh = done - self._done_before
        left = f", {clock((now - self._began) * (total - done) / fresh)} left" if fresh > 0 else ""
        self._write(f"{text}{left}{note}")
        global _on_screen
        self._next, _on_screen = now + _INTERVAL, self

    def clear(self) -> None:
        """Take the line back, so that something else can be written."""
        global _on_screen
        if _on_screen is self:
            _on_screen = None
            self._write("")

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def _write(self, text: str) -> None:
        if self._stream is not None:
            # A line that wraps could not be taken back.
            with suppress(OSError):  # of a terminal that is gone
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
