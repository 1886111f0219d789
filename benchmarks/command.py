"""How the commands of this folder complain: in one line on stderr, with an exit status, and before they measure."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastkv.errors import FastKVError

DONE, FAULT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Raises its complaints as FastKVError, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise FastKVError(message)


def guarded(name: str, work: Callable[[], None]) -> int:
    """The exit status of `work`: 0 done, 1 a fault of the disk, 2 a user's mistake, 130 interrupted."""
    try:
        work()
    except FastKVError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return FAULT
    return DONE


def check_writable(path: Path) -> None:
    """FastKVError unless `path` can be written: tried before anything is measured. Leaves no new file."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise FastKVError(f"{path}: cannot be written ({error.strerror})") from None
    if not existed:
        path.unlink()


def check_installed(flag: str, package: str, extra: str) -> None:
    """FastKVError unless `package`, which `flag` needs, can be found. Imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise FastKVError(f"{flag} needs {package}: pip install {package} (or the extra fastkv[{extra}])")
