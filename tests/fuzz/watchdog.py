"""Runs examples in a process of its own, so that one that hangs, takes all memory or crashes is a fault like others.

What runs there sees no terminal: what it writes to standard output or standard error is caught, and is a fault unless
it was asked for (`taken`). Linux alone tells what a process takes; elsewhere the tests that need this are skipped.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from fuzz.outcomes import FAULT, Outcome, outcome_of, shortened

from fastkv.models.text import template_process

Run = Callable[[Any], None]

CPU_SECONDS = 10.0  # of the processor, so that a busy machine changes nothing
IDLE_SECONDS = 5.0  # asleep all the time, as what waits for a pipe
MEMORY = 500 << 20  # bytes that an example may take on top of what its process has
_CLEAR_REFS = Path("/proc/self/clear_refs")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def works_here() -> bool:
    return _CLEAR_REFS.exists() and hasattr(os, "fork")


class Watchdog:
    """Hands examples to its process, one at a time, and puts another in its place when that has to be killed."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastkv-fuzz-"))
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, run: Run, example: Any) -> Outcome:
        """`run(example)`, a function of a module that is no test: what came of it."""
        if self._connection is None:
            self._start()
        assert self._connection is not None
        pid = self._process.pid
        cpu, memory, idle = _cpu_seconds(pid), _resident(pid), _Idle(pid)
        try:
            self._connection.send((run, example))
            while not self._connection.poll(0.02):
                if _cpu_seconds(pid) - cpu > CPU_SECONDS:
                    return self._killed(f"more than {CPU_SECONDS:g} s of processor time")
                if idle.seconds() > IDLE_SECONDS:
                    return self._killed("waits for something that never comes")
                if _resident(pid) - memory > MEMORY:
                    return self._killed(f"more than {MEMORY >> 20} MiB of memory")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            return self._killed(f"the process died with {self._process.exitcode}")

    def close(self) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection, self.folder), daemon=True)
        self._process.start()
        theirs.close()

    def _killed(self, what: str) -> Outcome:
        stack = _told_stack(self._process.pid, self.folder)
        self._end()
        functions = re.findall(r'File "(?!<).*/(\w+\.py)", line \d+, in (\w+)', stack)
        place = f" in {':'.join(functions[-1])}" if functions else ""
        return Outcome(FAULT, f"{what}{place}", stack)

    def _end(self) -> None:
        if self._connection is None:
            return
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._connection = None
        for left in self.folder.iterdir():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


class _Idle:
    """How long a process has been asleep, and has computed nothing."""

    def __init__(self, pid: int) -> None:
        self._pid, self._cpu, self._since = pid, -1.0, time.monotonic()

    def seconds(self) -> float:
        fields, cpu = _stat(self._pid), _cpu_seconds(self._pid)
        if cpu != self._cpu or not fields or fields[0] != "S":
            self._cpu, self._since = cpu, time.monotonic()
        return time.monotonic() - self._since


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_seconds(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def _resident(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _told_stack(pid: int, folder: Path) -> str:
    """The stack of a process that is to be killed, if it still answers: where the time goes."""
    with suppress(OSError):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
    with suppress(OSError):
        return (folder / "stack").read_text()[-4000:]
    return ""


# --- in the process that is watched ---

_captured: list[Path] = []


def taken() -> tuple[bytes, bytes]:
    """What has been written to standard output and standard error since the last time; then it counts as asked for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):
            stream.flush()
    out, err = (path.read_bytes() for path in _captured)
    for path in _captured:
        os.truncate(path, 0)
    return out, err


def fresh_streams() -> None:
    """Standard streams as a command finds them: files, of which nobody has changed the encoding."""
    for number, path in enumerate(_captured, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _serve(connection: Connection, other_end: Connection, folder: Path) -> None:
    other_end.close()
    _prepare(folder)
    served = 0
    while True:
        try:
            run, example = connection.recv()
        except (EOFError, ConnectionError):
            os._exit(0)
        connection.send(_watched(run, example))
        served += 1
        if served % 50 == 0:
            gc.collect()


def _prepare(folder: Path) -> None:
    """As in a process that pytest has nothing to do with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGUSR1, lambda _, frame: (folder / "stack").write_text("".join(traceback.format_stack(frame)))
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    _captured[:] = [folder / "stdout", folder / "stderr"]
    fresh_streams()
    logging.getLogger().handlers.clear()
    logging.getLogger("fastkv").addHandler(logging.NullHandler())  # a warning that is logged is no fault
    os.environ["RUST_BACKTRACE"] = "0"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.showwarning = _show_warning
    tempfile.tempdir = str(folder)
    template_process.SECONDS = 0.5  # hostile templates are many
    gc.collect()
    gc.freeze()


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _watched(run: Run, example: Any) -> Outcome:
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")  # the peak begins anew (man 5 proc)
    before = _status("VmRSS")
    taken()
    outcome = outcome_of(lambda: run(example))
    took = _status("VmHWM") - before
    written = b"".join(taken())
    if outcome.kind == FAULT:
        return outcome._replace(detail=f"{outcome.detail}\n{shortened(written[:4000].decode(errors='replace'))}")
    if written:
        text = written.decode(errors="replace")
        said = re.sub(r"\S*/(\S+/)", r"\1", text.strip())  # the last folder of a path says enough
        return Outcome(FAULT, f"something was printed: {said[:120]!a}", shortened(text[:4000]))
    if took > MEMORY:
        return Outcome(FAULT, f"more than {MEMORY >> 20} MiB of memory", f"{took >> 20} MiB; {outcome}")
    return outcome


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
