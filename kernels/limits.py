"""How much memory the system still gives to this process: the machine, its control groups, its own limits (ulimit).

Each says what it leaves in bytes, and the smallest holds. A source that is not there, or holds what nobody expects,
says nothing: never an error. Imports no torch: a process may have too little memory for that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Paths, so that tests can put others in their place.
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
GROUPS = Path("/proc/self/cgroup")  # which groups this process is in
MOUNT = Path("/sys/fs/cgroup")

_UNLIMITED = 2**60  # a limit from here on is none: version 1 of control groups writes the largest number that it can
_V1_MOUNT, _HYBRID_MOUNT = "memory", "unified"  # below MOUNT: of version 1, and of version 2 where both are there


class Left(NamedTuple):
    """Bytes that can still be taken, and what says so, in words for people."""

    nbytes: int
    why: str


def left() -> Left | None:
    """The least that any source leaves; None where none says anything."""
    found: list[Left] = [each for each in (_machine(), *_groups(), *_process()) if each is not None]
    return min(found) if found else None


def address_space_left() -> int | None:
    """Bytes that may still be mapped under `ulimit -v`; None: no limit, or unknown."""
    return next((each.nbytes for each in _process() if each.why == _ADDRESS_SPACE), None)


# --- the machine ---


def _machine() -> Left | None:
    available = _fields(MEMINFO).get("MemAvailable:")
    return None if available is None else Left(available * 1024, "free on this machine")


# --- control groups: of containers, batch systems and services ---


def _groups() -> Iterator[Left | None]:
    """What each group leaves that this process is in: every level up to the root may have a limit."""
    paths = _paths()
    for mount in (MOUNT, MOUNT / _HYBRID_MOUNT):
        for folder in _levels(mount, paths.get("")):
            yield _of_group(folder, "memory.max", "memory.current", "")
    for folder in _levels(MOUNT / _V1_MOUNT, paths.get("memory")):
        yield _of_group(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _paths() -> dict[str, str]:
    """The path of this process's group by controller; version 2 has "" for all of them."""
    paths: dict[str, str] = {}
    for line in _text(GROUPS).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _levels(mount: Path, path: str | None) -> Iterator[Path]:
    """The folders of a group and of those above it, as far as they can be seen from here.

    A container may see its own group as the root, and be told a path that is not there: then it is the root's files
    that hold.
    """
    parts = PurePosixPath(path or "/").parts[1:]
    for depth in range(0 if ".." in parts else len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _of_group(folder: Path, limit_name: str, used_name: str, prefix: str) -> Left | None:
    """What a group leaves, counting what the system can take back from file caches. prefix: of sums over the tree."""
    limit, used = _number(folder / limit_name), _number(folder / used_name)
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    figures = _fields(folder / "memory.stat")
    cached = sum(figures.get(f"{prefix}{kind}_file", figures.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
    return Left(max(0, min(limit, limit - used + cached)), "left by the limit of its control group")


# --- limits of the process ---

_ADDRESS_SPACE = "left by the limit on address space (ulimit -v)"


def _process() -> Iterator[Left]:
    try:
        import resource
    except ImportError:  # Windows
        return
    # Pages of: all mappings, resident, shared, code, (unused), data and stack.
    counts = [int(word) for word in _text(STATM).split() if word.isdigit()]
    if len(counts) < 6:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    for limit_of, pages, why in (
        (resource.RLIMIT_AS, counts[0], _ADDRESS_SPACE),
        (resource.RLIMIT_DATA, counts[5], "left by the limit on data (ulimit -d)"),
    ):
        soft, _ = resource.getrlimit(limit_of)
        if soft != resource.RLIM_INFINITY and soft < _UNLIMITED:
            yield Left(max(0, soft - pages * page), why)


def heap_free() -> int:
    """Bytes that this process has taken, and its C library has free for what comes next; 0 where it does not say."""
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "mallinfo2"):  # glibc from 2.33 on
        return 0
    library.mallinfo2.restype = _MallInfo
    return int(library.mallinfo2().fordblks)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


# --- files ---


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    """The whole number that a file holds, and nothing else."""
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 40 else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number (and perhaps a unit); other lines are left out."""
    fields: dict[str, int] = {}
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isascii() and words[1].isdigit() and len(words[1]) < 40:
            fields[words[0]] = int(words[1])
    return fields
