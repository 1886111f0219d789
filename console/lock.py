"""One writer at a time: a lock on an open file, which the system takes back when the process ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from fastkv.errors import cut

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FAR = 2**40  # where Windows locks a byte: far after the content, which stays readable


def lock(file: IO[bytes], *, shared: bool = False) -> bool:
    """Take the lock of a file, until it is closed; False where it is taken already.

    shared: several processes may have it together, but none that wants it alone. A file system without locks has none
    to take: then every process may have it.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            _lock_on_windows(file)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def holder(file: IO[bytes]) -> str:
    """Who has the lock of a file, as far as the system tells."""
    try:
        status = os.fstat(file.fileno())
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pid = next(fields[-4] for fields in locks if fields[1] == "FLOCK" and fields[-3] == place)
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, AttributeError, StopIteration, IndexError):
        return "another process"
    command = " ".join(filter(None, words))
    return f"process {pid} ({cut(command, 60)})"


def _lock_on_windows(file: IO[bytes]) -> None:
    import msvcrt

    place = file.tell()
    file.seek(_FAR)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    finally:
        file.seek(place)
