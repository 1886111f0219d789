"""One line on a terminal: what is being run, and how far it is. How many settings will be run is not known before."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

_INTERVAL = 0.1  # seconds between two updates


class Progress:
    """Silent unless `stream` is a terminal. A context manager: at the end, whatever that is, its line is gone."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None and stream.isatty() else None
        self._shown_at = 0.0

    def show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown_at >= _INTERVAL:
            self._shown_at = now
            self._write(f"{what}: {done} of {total} prompts")

    def clear(self) -> None:
        self._write("")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def _write(self, text: str) -> None:
        if self._stream is not None:
            # A line that wraps could not be taken back.
            self._stream.write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            self._stream.flush()
