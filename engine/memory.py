"""How much memory there is and was: of a GPU as torch tells it, of the host as the system does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fastkv.errors import FastKVError

CONTAINER = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, or None where the system does not say."""
    if device.type == "cuda":
        # What torch holds without using it is not free to others, but it is to us.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    limits = [limit for limit in (_host_available(), _container_available()) if limit is not None]
    return min(limits) if limits else None


def start_peak(device: torch.device) -> None:
    """Begin a new measurement of peak_bytes, where the system allows it.

    It counts for the whole process: on Linux the peak resident memory that the system reports of it begins anew too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        CLEAR_REFS.write_text("5")  # "5" resets VmHWM to what is resident now (man 5 proc)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory in bytes since start_peak: on a GPU allocated; on a CPU resident, of the whole process.

    Where the system cannot begin anew (not Linux, or /proc is closed) it is the process's peak so far; None where the
    system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _peak_resident()
    return _max_resident() if peak is None else peak


def _peak_resident() -> int | None:
    """VmHWM of Linux in bytes, which start_peak can reset."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _max_resident() -> int | None:
    """The same since the process began, in bytes, on any Unix."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _host_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _container_available() -> int | None:
    """What a container's limit (cgroup v2) leaves, counting what the system can take back from file caches."""
    try:
        limit = (CONTAINER / "memory.max").read_text().strip()
        used = int((CONTAINER / "memory.current").read_text())
        figures = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        cached = int(figures["active_file"]) + int(figures["inactive_file"])
        return None if limit == "max" else int(limit) - used + cached
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn torch's complaint about memory into one line that says what helps."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).splitlines()
        if not isinstance(error, torch.OutOfMemoryError) and not any("allocate memory" in line for line in lines[:1]):
            raise
        raise FastKVError(
            f"out of memory ({lines[0]}); take a shorter prompt, a lower kv_retention or fewer max_tokens"
        ) from None


def check_fits(what: str, needed: int, device: torch.device, advice: str, reusable: int = 0) -> None:
    """Raise FastKVError if `needed` bytes are more than `device` has left: said before anything is allocated.

    reusable: bytes that are taken but will be used again for this.
    """
    available = available_bytes(device)
    if available is not None and needed > available + reusable:
        left = size_text(available + reusable)
        raise FastKVError(f"{what} needs {size_text(needed)} of memory, but {device} has {left} left; {advice}")
