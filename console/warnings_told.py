"""What the package logs that is for people: warnings, and what takes long, as lines of the command's on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastkv.errors import one_line

_LONGEST = 2000  # characters of a line
_log = logging.getLogger("fastkv")
_long_log = logging.getLogger("fastkv.kernels.direct")  # compiling: some ten seconds, but once on a machine


@contextmanager
def warnings_told(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Say each warning that is logged inside, with the command's name in front, and what is compiled, whenever it is.

    Some of that is while a model is loaded; steps that judge drafts, and caches of another order of length, come later.
    """
    warnings = _Telling(say, logging.WARNING, f"{name}: warning: ")
    long = _Telling(say, logging.INFO, "")
    long.addFilter(lambda record: record.levelno < logging.WARNING)
    before = _long_log.level
    _log.addHandler(warnings)
    _long_log.addHandler(long)
    _long_log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(warnings)
        _long_log.removeHandler(long)
        _long_log.setLevel(before)


class _Telling(logging.Handler):
    def __init__(self, say: Callable[[str], None], level: int, begins: str) -> None:
        super().__init__(level)
        self._say, self._begins = say, begins

    def emit(self, record: logging.LogRecord) -> None:
        self._say(one_line(f"{self._begins}{record.getMessage()}", _LONGEST))
