"""What the package logs as a warning, as a line of the command's on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastkv.errors import one_line

_LONGEST = 2000  # characters of a line
_log = logging.getLogger("fastkv")


@contextmanager
def warnings_told(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Say each warning that is logged inside, with the command's name in front."""
    handler = _Telling(name, say)
    _log.addHandler(handler)
    try:
        yield
    finally:
        _log.removeHandler(handler)


class _Telling(logging.Handler):
    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._name, self._say = name, say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(one_line(f"{self._name}: warning: {record.getMessage()}", _LONGEST))
