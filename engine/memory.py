"""How much memory there is and was: of a GPU as torch tells it, of the host as the system does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fastkv.errors import FastKVError
from fastkv.kernels import limits
from fastkv.kernels.out_of_memory import Work, is_out_of_memory, told
from fastkv.kernels.ranks import Ranks

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, or None where the system does not say."""
    if device.type == "cuda":
        # What torch holds without using it is not free to others, but it is to us.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    left = limits.left()
    return None if left is None else left.nbytes + limits.heap_free()


def share_of(available: int | None, ranks: Ranks | None, device: torch.device) -> int | None:
    """What one of the ranks that share a model can take of what its device says: those of one host share its memory."""
    if available is None or ranks is None or device.type != "cpu":
        return available
    return available // ranks.on_host


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


@contextmanager
def explain_out_of_memory(work: Work) -> Iterator[None]:
    """Turn whatever says that memory ran out during `work` into a FastKVError of one line that says what helps.

    A complaint of our own that was raised because memory ran out is no other: it blames what it was looking at.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error, work, handled)
        raise


def raise_if_out_of_memory(error: Exception, work: Work, handled: BaseException | None = None) -> None:
    """The same for an error that has been caught; handled: what was being handled when the work began."""
    if is_out_of_memory(error, handled):
        raise FastKVError(told(error, work)) from None


def check_fits(
    what: str,
    parts: Mapping[str, int],
    device: torch.device,
    advice: str,
    reusable: int = 0,
    ranks: Ranks | None = None,
) -> None:
    """Raise FastKVError if the bytes of all `parts` are more than `device` has left: said before anything is allocated.

    parts: by what they are for, in words; the large ones are told. reusable: bytes that are taken but will be used
    again for this. ranks: those of a model; where it does not fit on one, all refuse.
    """
    available, needed = share_of(available_bytes(device), ranks, device), sum(parts.values())
    spare = sys.maxsize if available is None else available + reusable - needed
    if (spare if ranks is None else ranks.least(spare, device)) >= 0:  # all ranks come to the same decision
        return
    if available is None or spare >= 0:
        raise FastKVError(f"{what} needs more memory than another rank has; {advice}")
    left = f"{size_text(available + reusable)} {_why(device, available)}"
    raise FastKVError(f"{what} needs {size_text(needed)} of memory{_told(parts)}, but {device} has {left}; {advice}")


def _told(parts: Mapping[str, int]) -> str:
    """The largest parts; what is less than a hundredth of all goes without saying."""
    large = [(name, size) for name, size in parts.items() if size > sum(parts.values()) / 100]
    if len(large) < 2:
        return "".join(f" ({name})" for name, _ in large)
    return " (" + ", ".join(f"{size_text(size)} of {name}" for name, size in large) + ")"


def _why(device: torch.device, available: int) -> str:
    """What says that no more is left."""
    found = limits.left() if device.type == "cpu" else None
    return "left" if found is None or found.nbytes > available else found.why
