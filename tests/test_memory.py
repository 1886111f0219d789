"""The peak of a request is the request's own, where the system lets a measurement begin anew."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from fastkv.engine import memory

CPU = torch.device("cpu")
BIG = 2**28  # bytes: far beyond what the allocator would keep for itself


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def _can_begin_anew() -> None:
    if not os.access(memory.CLEAR_REFS, os.W_OK) or "VmHWM" not in memory.STATUS.read_text():
        pytest.skip("this system does not let a measurement of the peak begin anew")


@pytest.mark.usefixtures("_can_begin_anew")
def test_what_was_let_go_before_is_no_part_of_the_peak() -> None:
    torch.ones(BIG, dtype=torch.uint8)
    before = memory.peak_bytes(CPU)
    memory.start_peak(CPU)
    torch.ones(1000)
    after = memory.peak_bytes(CPU)
    assert before is not None
    assert after is not None
    assert before - after > 0.9 * BIG


@pytest.mark.usefixtures("_can_begin_anew")
def test_the_peak_sees_what_lived_only_in_between() -> None:
    memory.start_peak(CPU)
    at_rest = resident()
    torch.ones(BIG, dtype=torch.uint8)
    peak = memory.peak_bytes(CPU)
    assert peak is not None
    assert 0.9 * BIG < peak - at_rest < 1.2 * BIG


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_where_the_system_does_not_say_it_is_the_peak_so_far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A closed /proc is no error: the figure is that of getrusage, which only grows."""
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    memory.start_peak(CPU)
    torch.ones(BIG, dtype=torch.uint8)
    first = memory.peak_bytes(CPU)
    memory.start_peak(CPU)
    second = memory.peak_bytes(CPU)
    assert first is not None
    assert second is not None
    assert second >= first > BIG


def test_a_status_without_the_line_is_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  12 kB\n")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.peak_bytes(CPU) == memory._max_resident()
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  12 kB\n")
    assert memory.peak_bytes(CPU) == 12 * 1024
