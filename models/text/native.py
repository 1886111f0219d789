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
def guarded_call(quiet: bool = True) -> Iterator[None]:
    """Raise LibraryError for whatever the calls inside raise.

    A panic is no Exception to Python, and has printed its message by the time it gets here. quiet: hold back what is
    written to stderr meanwhile, by other threads, too, and then write it without such messages. That is for calls that
    are likely to panic: a program that another thread starts meanwhile has the wrong stderr.
    """
    if quiet:
        _stderr.hold()
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise LibraryError(str(error) or type(error).__name__) from None
    finally:
        if quiet:
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
            with suppress(OSError):  # stderr is closed, or no file can be made: panics print what they print
                self._held = _file() if self._held is None else self._held
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
            if os.lseek(self._held, 0, os.SEEK_CUR):
                self._forward(self._held)

    def begin_anew(self) -> None:
        """In a fork, which has none of the other threads: what these hold back is let go."""
        self._lock, self._calls = threading.Lock(), 0
        if self._real is not None:
            os.dup2(self._real, _STDERR)
            os.close(self._real)
        if self._held is not None:  # the parent writes to it, too
            os.close(self._held)
        self._real = self._held = None

    @staticmethod
    def _forward(held: int) -> None:
        """Write to stderr what was held back, but for panics, and empty the file."""
        os.lseek(held, 0, os.SEEK_SET)
        with os.fdopen(os.dup(held), "rb") as file:
            text = _PANIC.sub(b"", file.read())
        os.ftruncate(held, 0)
        os.lseek(held, 0, os.SEEK_SET)
        with suppress(OSError):
            while text:
                text = text[os.write(_STDERR, text) :]


def _file() -> int:
    """A file without a name: in memory, where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("held-back")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


_stderr = _Stderr()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stderr.begin_anew)
