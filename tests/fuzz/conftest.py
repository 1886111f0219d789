"""Fuzz tests: what they share, and the table of `make fuzz`. Without hypothesis they are skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fuzz import watchdog
from fuzz.outcomes import KINDS

if TYPE_CHECKING:
    from fuzz.recording import Fuzz

_totals: dict[str, Counter[str]] = {}


@pytest.fixture(scope="session")
def watched() -> Iterator[watchdog.Watchdog]:
    if not watchdog.works_here():
        pytest.skip("the watchdog of the fuzz tests reads what Linux tells of a process")
    dog = watchdog.Watchdog()
    yield dog
    dog.close()


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, watched: watchdog.Watchdog) -> Iterator[Fuzz]:
    """fuzz(strategy, run, ordinary=N, share=S) runs examples; see recording.py."""
    from fuzz.recording import Fuzz

    made = Fuzz(request.node.name.removeprefix("test_"), watched)
    yield made
    by_policy = "policy" in getattr(request.node, "callspec", SimpleNamespace(params={})).params
    row = request.node.originalname.removeprefix("test_") if by_policy else made.name
    request.node.user_properties.append(("fuzz", [row, dict(made.counts)]))


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "teardown":
        for key, value in report.user_properties:
            if key == "fuzz":
                name, counts = value
                _totals.setdefault(name, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _totals:
        return
    width = max(map(len, _totals))
    terminalreporter.section("examples")
    terminalreporter.write_line(f"{'':{width}} {'examples':>9}" + "".join(f"{kind:>11}" for kind in KINDS))
    for name, counts in sorted(_totals.items()):
        row = "".join(f"{counts[kind]:>11,}" for kind in KINDS)
        terminalreporter.write_line(f"{name:{width}} {counts.total():>9,}{row}")
