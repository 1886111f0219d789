"""Which of several ways to compute the same is fastest here: measured once, remembered in the user's cache folder.

A choice is made by timing when it is first asked for, and written down for this CPU, torch
version and number of threads; from then on it stays. Deleting the folder `calibration` there begins anew.
FASTKV_CALIBRATION=off measures nothing and reads nothing: every choice is its default, for runs that are to be
reproduced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastkv.kernels.out_of_memory import is_out_of_memory
from fastkv.storage import cache_folder, write_atomically

VARIABLE = "FASTKV_CALIBRATION"
_FORMAT = 2  # of what is written; rises when a way of this name means something else
_ROUNDS = 5  # of all ways in turn, after one that does not count; the fastest of each counts
_ENOUGH = 0.03  # seconds after which no other round begins
_MARGIN = 0.95  # another way than the default must take less than this share of its time

_log = logging.getLogger(__name__)
_clock = time.perf_counter

Way = Callable[[], object]


@dataclass(frozen=True)
class Choice:
    """What was found: the way that is taken, and the seconds of each."""

    way: str
    seconds: dict[str, float]


class Calibration:
    """The choices of one machine. file: where they are kept (None: nowhere)."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._choices = {} if file is None else _read(file)
        self._asked: dict[str, Choice] = {}
        self._lock = threading.RLock()  # a way may need a choice of its own

    def choose(self, what: str, default: str, names: Collection[str], ways: Callable[[], Mapping[str, Way]]) -> str:
        """The name of the fastest way to do `what`: the known one, else it is measured.

        names: of all ways that there are, `default` among them: what was remembered of others does not count. ways:
        makes what is to be timed, by name. A way that raises an error is out.
        """
        with self._lock:
            known = self._choices.get(what)
            if known is None or known.way not in names:
                measured = _if_there_is_memory(lambda: _measured(default, ways()))
                if measured is None:
                    return default
                self._choices[what] = measured
                self._save(what, names)
            self._asked[what] = self._choices[what]
            return self._asked[what].way

    def asked(self) -> dict[str, Choice]:
        """The choices that this process has made or been told, by what they are about."""
        with self._lock:
            return dict(self._asked)

    def _save(self, what: str, names: Collection[str]) -> None:
        if self._file is None:
            return
        # Another process may have measured meanwhile: what it wrote stays, so that the first one decides.
        there = _read(self._file)
        if what in there and there[what].way not in names:
            del there[what]
        self._choices |= there
        written = {name: {"way": each.way, "seconds": each.seconds} for name, each in self._choices.items()}
        content = json.dumps({"format": _FORMAT, "machine": _machine(), "choices": written}, indent=1)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, content.encode(), durable=False)
        except OSError as error:
            _log.info("calibration is not kept: %s: %s", self._file, error.strerror)
            self._file = None


def is_on() -> bool:
    """Whether anything is measured, as the environment says."""
    return os.environ.get(VARIABLE, "").lower() not in ("off", "0", "no", "false")


def calibration() -> Calibration:
    """The choices for this machine, as many threads as torch has now, and the cache folder of now."""
    try:
        folder: Path | None = cache_folder() / "calibration"
    except RuntimeError:  # a user without a home: nothing is kept
        folder = None
    return _calibration(folder, torch.get_num_threads())


def asked() -> dict[str, Choice]:
    """All choices that this process has made or been told, by what they are about and with how many threads."""
    return {f"{what}, {threads} threads": each for threads, one in _all.items() for what, each in one.asked().items()}


_all: dict[int, Calibration] = {}  # by threads


@cache
def _calibration(folder: Path | None, threads: int) -> Calibration:
    key = json.dumps([_machine(), threads, _FORMAT])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    made = _all[threads] = Calibration(None if folder is None else folder / name)
    return made


@cache
def _machine() -> dict[str, Any]:
    """What a choice holds for, besides the number of threads."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}


def cpu_name() -> str:
    """The model of the CPU, as the system names it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> str:
    """The instructions that the CPU has, as the system names them; "" where it does not."""
    return _cpuinfo("flags") or _cpuinfo("Features") or ""


def _cpuinfo(key: str) -> str | None:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(": ", 1)[1] for line in lines if line.startswith(key) and ": " in line), None)
    return None


def _measured(default: str, ways: Mapping[str, Way]) -> Choice:
    """Time every way; the default stays unless another one is clearly faster."""
    seconds: dict[str, float] = {}
    working, began = dict(ways), _clock()
    for counted in range(-1, _ROUNDS):
        if counted > 0 and _clock() - began > _ENOUGH:
            break
        for name, way in list(working.items()):
            try:
                started = _clock()
                way()
                taken = _clock() - started
            except Exception:  # an operator that another version of torch lacks, or that refuses these sizes
                del working[name]
                seconds.pop(name, None)
                continue
            if counted >= 0:
                seconds[name] = min(taken, seconds.get(name, taken))
    if not seconds:
        return Choice(default, {})
    best = min(seconds, key=lambda name: seconds[name])
    stays = default in seconds and seconds[best] >= _MARGIN * seconds[default]
    return Choice(default if stays else best, seconds)


def _if_there_is_memory(measure: Callable[[], Choice]) -> Choice | None:
    """What is measured; None where there is too little memory for it: that is no reason to fail, nor to remember."""
    try:
        return measure()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _read(file: Path) -> dict[str, Choice]:
    """What a file holds; a broken one, or one of another format, holds nothing."""
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != _FORMAT:
            return {}
        found = {
            str(what): Choice(str(each["way"]), {str(name): float(s) for name, s in each["seconds"].items()})
            for what, each in content["choices"].items()
        }
        return {what: each for what, each in found.items() if all(map(math.isfinite, each.seconds.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
