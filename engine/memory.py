"""How much memory there is and was: of a GPU as torch tells it, of the host as the system does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastkv.errors import FastKVError

CONTAINER = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, or None where the system does not say."""
    if device.type == "cuda":
        # What torch holds without using it is not free to others, but it is to us.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    limits = [limit for limit in (_host_available(), _container_available()) if limit is not None]
    return min(limits) if limits else None


def start_peak(device: torch.device) -> None:
    """Begin a new measurement of peak_bytes, where the device allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """GPU: most memory allocated since start_peak. CPU: most resident memory of this process so far. Or None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(count: int) -> str:
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


def check_fits(what: str, needed: int, device: torch.device, advice: str) -> None:
    """Raise FastKVError if `needed` bytes are more than `device` has left: said before anything is allocated."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise FastKVError(f"{what} needs {_size(needed)} of memory, but {device} has {_size(available)} left; {advice}")
