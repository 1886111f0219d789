"""Reading the files of a model folder, whatever they turn out to be."""

from __future__ import annotations

from pathlib import Path

from fastkv.errors import FastKVError


def check_ordinary(path: Path) -> None:
    """FastKVError for what is there and is no ordinary file: a pipe would be read for ever, a device without end."""
    try:
        odd = path.exists() and not path.is_file()
    except OSError:  # reading it will say what is wrong
        return
    if odd:
        raise FastKVError(f"{path}: cannot be read, for it is no ordinary file; fetch it again")
