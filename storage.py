"""Files that outlive a process: the user's cache folder, which may be deleted at any time, and writing in one step."""

from __future__ import annotations

import os
from pathlib import Path

from fastkv.errors import FastKVError

VARIABLE = "FASTKV_CACHE"


def cache_folder() -> Path:
    """$FASTKV_CACHE, else $XDG_CACHE_HOME/fastkv, else ~/.cache/fastkv. It need not be there yet."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastkv"


def check_cache_folder() -> None:
    """FastKVError unless files can be put there."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        wrong = "cannot be written to" if there.is_dir() else "is no folder"
        raise FastKVError(f"cache folder {folder}: {there} {wrong}; set {VARIABLE} to another one")


def write_atomically(path: Path, content: bytes) -> None:
    """Fill a file beside `path`, or beside the file that it is a link to, then move it there in one step."""
    path = path.resolve()
    whole = name_beside(path)
    try:
        whole.write_bytes(content)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """Where what is to become `path` is written: in the same folder, by this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
