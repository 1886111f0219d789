"""Files that outlive a process: the user's cache folder, which may be deleted at any time, and writing in one step."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastkv.errors import FastKVError, FaultError

VARIABLE = "FASTKV_CACHE"
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def cache_folder() -> Path:
    """$FASTKV_CACHE, else $XDG_CACHE_HOME/fastkv, else ~/.cache/fastkv. It need not be there yet."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastkv"


def is_odd(path: str | Path) -> bool:
    """Whether what is there is no ordinary file: a pipe may be waited for for ever, and a device has no end."""
    return os.path.exists(path) and not os.path.isfile(path)  # as methods of a Path these may raise


def is_endless(path: str | Path) -> bool:
    """Whether it is a device, and no terminal. Pipes are none: texts may come from a shell's `<(command)`."""
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):
            return False
        device = os.open(path, os.O_RDONLY | getattr(os, "O_NOCTTY", 0))
    except (OSError, ValueError):  # reading it will say what is wrong
        return False
    try:
        return not os.isatty(device)
    finally:
        os.close(device)


def check_cache_folder() -> None:
    """FastKVError unless files can be put there."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        wrong = "cannot be written to" if there.is_dir() else "is no folder"
        raise FastKVError(f"cache folder {folder}: {there} {wrong}; set {VARIABLE} to another one")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write beside `path`, or beside the file that it is a link to; in the end it moves there in one step.

    Whatever fails on the way, the earlier file stays as it was. durable: it is on the disk before it takes the place of
    the earlier one, so that even a power cut leaves one of them; not needed for what can be made again.
    """
    path = Path(os.path.realpath(path))
    with _file_beside(path) as file:
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        file.close()  # Windows moves no open file
        os.replace(file.name, path)


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Let a file hold this, in one step: see `replacing`."""
    with replacing(path, durable=durable) as file:
        file.write(content)


def unwritable(path: str | Path, error: OSError, setting: str) -> FastKVError:
    """The complaint, in one line: a full or broken disk is a fault, all else is for the user to mend."""
    kind = FaultError if error.errno in _FAULTS else FastKVError
    return kind(f"{path}: cannot be written ({error.strerror})", setting=setting)


def try_beside(path: Path) -> None:
    """OSError unless `write_atomically` can put a file at `path`, as far as that can be known; nothing stays."""
    path = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):  # of the name itself: it may be too long
        path.lstat()
    with _file_beside(path):
        pass


@contextmanager
def _file_beside(path: Path) -> Iterator[IO[bytes]]:
    """A new file in the folder of `path`, with the permissions of the file that is there; in the end it is gone.

    Nobody can know its name before, and it is never a file or a link that was there already.
    """
    mode = _mode_of(path)

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666 if mode is None else mode)

    name = path.with_name(f".fastkv-{secrets.token_hex(8)}.tmp")
    with open(name, "xb", opener=opened) as file:
        try:
            if mode is not None:  # of which the process's mask may have taken some away
                os.chmod(file.fileno() if os.chmod in os.supports_fd else name, mode)
            yield file
        finally:
            try:
                file.close()  # Windows removes no open file
            finally:  # closing writes what is left, on a disk that may be full
                name.unlink(missing_ok=True)


def _mode_of(path: Path) -> int | None:
    """The permissions of an ordinary file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mode & 0o777 if stat.S_ISREG(status.st_mode) else None
