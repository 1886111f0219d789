"""Files that are written: found out before the work is done whether they can be, and there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fastkv.errors import FastKVError


def write_atomically(path: Path, content: bytes) -> None:
    """Fill a file beside `path`, or beside the file that it is a link to, then move it there in one step."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_writable(path: str | Path, setting: str) -> None:
    """Raise FastKVError, naming the setting, unless `path` can be written. An existing file stays as it is."""
    target = Path(os.path.realpath(path))  # where a link leads, which may not be there yet
    try:
        if not os.path.lexists(target):
            target.open("xb").close()
            target.unlink()
        elif target.is_file() or target.is_dir():  # not a pipe or a device: opening one might block, or be seen
            target.open("ab").close()
    except OSError as error:
        raise unwritable(path, error, setting) from None


def unwritable(path: str | Path, error: OSError, setting: str) -> FastKVError:
    """The complaint, in one line."""
    return FastKVError(f"{path}: cannot be written ({error.strerror})", setting=setting)
