"""Ctrl-C while an answer is made: it ends the answer between two tokens, not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """A context manager that takes SIGINT, where `taken`. Before `gently`, it raises KeyboardInterrupt as ever.

    asked: whether it came after that. A token that is half made must not be what a session keeps, while reading a long
    prompt has to be left at once, and leaves nothing.
    """

    def __init__(self, taken: bool) -> None:
        ours = threading.current_thread() is threading.main_thread()
        self._taken = taken and ours and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        self._gentle = False
        self.asked = False
        self._before: Any = None

    def gently(self) -> None:
        """From here on SIGINT only sets `asked`."""
        self._gentle = self._taken

    def __enter__(self) -> Stop:
        if self._taken:
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._taken:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if not self._gentle:
            raise KeyboardInterrupt
        self.asked = True
