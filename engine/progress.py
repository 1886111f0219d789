"""One line on a terminal that says how far something long has come, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_PATIENCE = 1.0  # seconds before a line appears: what is short shows none
_INTERVAL = 0.1  # seconds between two updates


class ProgressLine:
    """A context manager; `show(done, total)`. Silent unless `stream` is a terminal.

    text: what to say of (done, total), behind which the time left is put.
    """

    def __init__(self, stream: TextIO | None, text: Callable[[int, int], str]) -> None:
        self._stream = stream
        self._text = text
        self._live = stream is not None and stream.isatty()
        self._started = time.monotonic()
        self._next = self._started + _PATIENCE
        self._shown = False

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._stream is None or not self._live or now < self._next:
            return
        left = (now - self._started) * (total - done) / max(done, 1)
        self._stream.write(f"\r{self._text(done, total)}, {left:.0f} s left \x1b[K")
        self._stream.flush()
        self._next = now + _INTERVAL
        self._shown = True

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def loading(done: int, total: int) -> str:
    """Of weights, in bytes."""
    return f"loading {done / 2**30:.1f} of {total / 2**30:.1f} GiB"


def answering(done: int, total: int) -> str:
    """Of prompts."""
    return f"{done} of {total} prompts"
