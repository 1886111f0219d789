"""Calls into libraries that are written in Rust: a panic there becomes an error, and prints nothing of its own."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDERR = 2  # the file descriptor that Rust writes to, whatever sys.stderr is
_PANIC = re.compile(rb"\n?thread '[^']*'[^\n]* panicked at .*?(?:note: run with [^\n]*\n|\Z)", re.DOTALL)


class LibraryError(Exception):
    """What a library raised, a panic included. The message is the library's."""


@contextmanager
def guarded_call() -> Iterator[None]:
    """Raise LibraryError for whatever the calls inside raise.

    A panic is no Exception to Python, and has printed its message by the time it gets here. So what is written to
    stderr meanwhile, by other threads, too, is held back, and then written without such messages.
    """
    _stderr.hold()
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise LibraryError(str(error) or type(error).__name__) from None
    finally:
        _stderr.let_go()


class _Stderr:
    """Holds back what is written to stderr, from the first call of several threads to the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._held: int | None = None  # a file without a name that takes the place of stderr, gone with the process
        self._real: int | None = None  # stderr, while its place is taken

    def hold(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls > 1:
                return
            if self._held is None:
                with tempfile.TemporaryFile() as file:
                    self._held = os.dup(file.fileno())
            with suppress(OSError):  # it is closed: nothing can be printed
                self._real = os.dup(_STDERR)
                os.dup2(self._held, _STDERR)

    def let_go(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls or self._real is None or self._held is None:
                return
            os.dup2(self._real, _STDERR)
            os.close(self._real)
            self._real = None
            if size := os.lseek(self._held, 0, os.SEEK_CUR):
                self._forward(self._held, size)

    def begin_anew(self) -> None:
        """In a fork, which has none of the other threads: what these hold back is let go."""
        real = self._real
        self.__init__()  # type: ignore[misc]
        if real is not None:
            os.dup2(real, _STDERR)
            os.close(real)

    @staticmethod
    def _forward(held: int, size: int) -> None:
        """Write to stderr what was held back, but for panics, and empty the file."""
        os.lseek(held, 0, os.SEEK_SET)
        text = _PANIC.sub(b"", os.read(held, size))
        os.ftruncate(held, 0)
        os.lseek(held, 0, os.SEEK_SET)
        with suppress(OSError):
            os.write(_STDERR, text)


_stderr = _Stderr()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stderr.begin_anew)
