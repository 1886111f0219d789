"""Calls into libraries that are written in Rust: a panic there becomes an error, and prints nothing of its own."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

_STDERR = 2  # the file descriptor that Rust writes to, whatever sys.stderr is
_PANIC = re.compile(rb"\n?thread '[^']*'[^\n]* panicked at .*?(?:note: run with [^\n]*\n|\Z)", re.DOTALL)
_turn = threading.RLock()


class LibraryError(Exception):
    """What a library raised, a panic included. The message is the library's."""


@contextmanager
def guarded_call() -> Iterator[None]:
    """Raise LibraryError for whatever the calls inside raise.

    A panic is no Exception to Python, and has printed its message by the time it gets here. So what is written to
    stderr meanwhile, by other threads, too, is held back, and then written without such messages.
    """
    with _turn, _stderr_held_back():
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise LibraryError(str(error) or type(error).__name__) from None


@contextmanager
def _stderr_held_back() -> Iterator[None]:
    try:
        real = os.dup(_STDERR)
    except OSError:  # it is closed: nothing can be printed
        yield
        return
    held = _file()
    os.dup2(held, _STDERR)
    try:
        yield
    finally:
        os.dup2(real, _STDERR)
        os.close(real)
        if size := os.lseek(held, 0, os.SEEK_CUR):
            _forward(held, size)


@cache
def _file() -> int:
    """The file that takes the place of stderr: it has no name, and is gone with the process."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _forward(held: int, size: int) -> None:
    """Write to stderr what was held back, but for panics, and empty the file."""
    os.lseek(held, 0, os.SEEK_SET)
    text = _PANIC.sub(b"", os.read(held, size))
    os.ftruncate(held, 0)
    os.lseek(held, 0, os.SEEK_SET)
    with suppress(OSError):
        os.write(_STDERR, text)
