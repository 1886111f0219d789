"""Runs a generator's examples through hypothesis: how many, what is counted, and what is written of a fault."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.outcomes import FAULT, UNDECIDED, Outcome
from fuzz.watchdog import Run, Watchdog
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis.strategies import SearchStrategy

EXAMPLES = "FASTKV_FUZZ_EXAMPLES"  # of all generators together; then they are drawn at random
FOLDER = "FASTKV_FUZZ_FOLDER"
_TRIES = 40  # to make an example smaller


class Fuzz:
    """Called by a test with what it draws and what it does with that.

    In an ordinary run the examples are the same each time, and the first fault fails the test; hypothesis makes its
    example small. With $FASTKV_FUZZ_EXAMPLES they are random ones, all of them run, and each kind of fault is written
    into a folder.
    """

    def __init__(self, name: str, watchdog: Watchdog) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.faults: dict[str, int] = {}
        self._watchdog = watchdog
        self._wanted = int(os.environ.get(EXAMPLES, 0))

    def __call__(self, strategy: SearchStrategy[Any], run: Run, *, ordinary: int, share: float) -> None:
        """Run `ordinary` examples of the strategy, or this share of those that were asked for."""
        __tracebackhide__ = True  # a strategy prints itself at great length

        @settings(
            max_examples=int(self._wanted * share) or ordinary,
            derandomize=not self._wanted,
            database=None,
            deadline=None,
            phases=(Phase.generate,) if self._wanted else (Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def of_any(example: Any) -> None:
            self._one(run, example)

        of_any()
        told = "\n".join(f"{count} times: {what}" for what, count in self.faults.items())
        assert not self.faults, f"{self.name}: {len(self.faults)} kinds of faults, in {folder()}:\n{told}"

    def _one(self, run: Run, example: Any) -> None:
        outcome = self._watchdog.run(run, example)
        self.counts[outcome.kind] += 1
        if outcome.kind == UNDECIDED and not self._wanted:
            assume(False)
        if outcome.kind != FAULT:
            return
        assert self._wanted, f"{outcome.what}\n{outcome.detail}"
        place = getattr(example, "place", "")  # of what is hostile: what says nothing more is told apart by that
        kind = re.sub(
            r"\S*/fastkv-fuzz-\S*/|\d+|0x[0-9a-f]+", "N", f"{outcome.what} ({place})" if place else outcome.what
        )
        if kind not in self.faults:
            example, outcome = self._smaller(run, example, outcome)
            _write(self.name, len(self.faults), run, example, outcome)
        self.faults[kind] = self.faults.get(kind, 0) + 1

    def _smaller(self, run: Run, example: Any, outcome: Outcome) -> tuple[Any, Outcome]:
        """The same fault with less of the example, where the example says how it can be less."""
        tries = 0
        found = True
        while found:
            found = False
            for smaller in _smaller_ones(example):
                tries += 1
                if tries > _TRIES:
                    return example, outcome
                again = self._watchdog.run(run, smaller)
                if again.kind == FAULT and again.what[:40] == outcome.what[:40]:
                    example, outcome, found = smaller, again, True
                    break
        return example, outcome


def _smaller_ones(example: Any) -> Iterator[Any]:
    return iter(getattr(example, "smaller", lambda: ())())


def folder() -> Path:
    return Path(os.environ.get(FOLDER, ".fuzz"))


def _write(name: str, number: int, run: Run, example: Any, outcome: Outcome) -> None:
    """A program that shows the fault again, with all that is known of it as its first lines."""
    folder().mkdir(parents=True, exist_ok=True)
    told = "\n".join(f"# {line}".rstrip() for line in f"{outcome.what}\n{outcome.detail}".splitlines())
    names = f"from {type(example).__module__} import *\nfrom {run.__module__} import {run.__name__}"
    names += "\nfrom fuzz.watchdog import Watchdog"
    shown = f"print(Watchdog().run({run.__name__}, {example!r}))"
    program = f"{told}\n# PYTHONPATH=FOLDER_OF_THE_PACKAGE:tests python THIS_FILE\n{names}\n\n{shown}\n"
    path = folder() / f"{re.sub('[^a-z]+', '-', name)}-{number}.py"
    path.write_text(program, encoding="utf-8", errors="backslashreplace")
