"""Where a report is to go: found out before the work is done, without anything heavy."""

from __future__ import annotations

import os
from pathlib import Path

from fastkv.errors import FastKVError


def check_writable(path: str | Path) -> None:
    """Raise FastKVError unless a page can be written to `path`. An existing file stays as it is."""
    target = Path(os.path.realpath(path))  # where a link leads, which may not be there yet
    try:
        if not os.path.lexists(target):
            target.open("xb").close()
            target.unlink()
        elif target.is_file() or target.is_dir():  # not a pipe or a device: opening one might block, or be seen
            target.open("ab").close()
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: str | Path, error: OSError) -> FastKVError:
    """The complaint, in one line."""
    return FastKVError(f"{path}: cannot be written ({error.strerror})", setting="report")
