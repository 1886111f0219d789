"""What the system leaves to this process: of the machine, of control groups of both versions, of ulimit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastkv.engine import memory
from fastkv.kernels import limits

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712  # what version 1 writes for no limit


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free and no limits, in a folder: what a test writes there is what the system says."""
    for name in ("MEMINFO", "STATM", "GROUPS", "MOUNT"):
        monkeypatch.setattr(limits, name, tmp_path / name.lower())
    (tmp_path / "meminfo").write_text(f"MemTotal: {2**24} kB\nMemAvailable:   {2**23} kB\nHugePages_Total:   0\n")
    monkeypatch.setattr(limits, "heap_free", lambda: 0)
    return tmp_path


def group(folder: Path, limit: int | str, used: int, cached: int = 0) -> None:
    """A group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {cached}\ninactive_file 0\n")


def group_v1(folder: Path, limit: int, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    # The plain lines are of the group alone, without those below it.
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {cached}\ntotal_active_file 0\n")


def left() -> int | None:
    found = limits.left()
    return None if found is None else found.nbytes


def test_the_machine_alone() -> None:
    assert left() == 8 * GIB
    assert memory.available_bytes(torch.device("cpu")) == 8 * GIB


def test_nothing_is_known_where_the_system_says_nothing(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert limits.left() is None
    assert memory.available_bytes(torch.device("cpu")) is None


def test_a_container_sees_its_own_group_as_the_root(machine: Path) -> None:
    (machine / "groups").write_text("0::/\n")
    group(machine / "mount", 4 * GIB, 3 * GIB, cached=GIB // 2)
    found = limits.left()
    assert found is not None
    assert found.nbytes == 1.5 * GIB
    assert "control group" in found.why


def test_the_smallest_remainder_of_all_levels_holds(machine: Path) -> None:
    """A service may be free where the slice above it is nearly full."""
    (machine / "groups").write_text("0::/user.slice/job.scope\n")
    group(machine / "mount" / "user.slice" / "job.scope", 4 * GIB, GIB)
    group(machine / "mount" / "user.slice", 6 * GIB, 5 * GIB)
    group(machine / "mount", "max", 7 * GIB)
    assert left() == GIB
    group(machine / "mount" / "user.slice", "max", 5 * GIB)
    assert left() == 3 * GIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../other"])
def test_a_path_that_cannot_be_seen_from_here_leaves_the_root(machine: Path, path: str) -> None:
    (machine / "groups").write_text(f"0::{path}\n")
    group(machine / "mount", 2 * GIB, GIB)
    assert left() == GIB


def test_version_1(machine: Path) -> None:
    (machine / "groups").write_text("9:name=systemd:/\n4:cpu,memory:/batch/job:7\n0::/\n")
    folder = machine / "mount" / "memory"
    group_v1(folder / "batch" / "job:7", UNLIMITED_V1, GIB)
    group_v1(folder, UNLIMITED_V1, GIB)
    assert left() == 8 * GIB
    group_v1(folder / "batch" / "job:7", 2 * GIB, GIB, cached=GIB // 4)
    assert left() == 1.25 * GIB
    group_v1(folder / "batch", 2 * GIB, 3 * GIB)  # over its limit
    assert left() == 0


def test_both_versions_at_once(machine: Path) -> None:
    """A hybrid system: memory belongs to one of the two."""
    (machine / "groups").write_text("4:memory:/a\n0::/b\n")
    group_v1(machine / "mount" / "memory" / "a", 3 * GIB, GIB)
    assert left() == 2 * GIB
    group(machine / "mount" / "unified" / "b", 2 * GIB, GIB)
    assert left() == GIB


@pytest.mark.parametrize(
    ("limit", "used"),
    [("", "1"), ("-1", "1"), ("many", "1"), ("1e3", "1"), ("1 2", "1"), ("9" * 5000, "1"), ("٣", "1")],
)
def test_odd_content_says_nothing(machine: Path, limit: str, used: str) -> None:
    (machine / "groups").write_text("\n:\n::\nx\n0::\n4:memory\n0::relative\n")
    group(machine / "mount", limit, 1)
    (machine / "mount" / "memory.current").write_text(used)
    (machine / "mount" / "memory.stat").write_bytes(b"\xff\xfe\nactive_file\nactive_file x\n")
    assert left() == 8 * GIB


def test_folders_in_place_of_files(machine: Path) -> None:
    for name in ("groups", "statm", "mount/memory.max", "mount/memory/memory.limit_in_bytes"):
        (machine / name).mkdir(parents=True)
    assert left() == 8 * GIB


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_ulimit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits count what is mapped, or data alone, whatever of it is resident."""
    import resource

    soft = {resource.RLIMIT_AS: 4 * GIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft[which], resource.RLIM_INFINITY))
    monkeypatch.setattr("os.sysconf", lambda name: 4096)
    (machine / "statm").write_text(f"{GIB // 4096} 100 50 5 0 {GIB // 8192} 0\n")
    found = limits.left()
    assert found is not None
    assert found.nbytes == limits.address_space_left() == 3 * GIB
    assert "ulimit -v" in found.why
    soft[resource.RLIMIT_DATA] = GIB
    assert left() == GIB // 2
    soft[resource.RLIMIT_AS] = 0
    assert left() == 0
    (machine / "statm").write_text("what\n")
    assert left() == 8 * GIB


def test_a_refusal_says_what_limits(machine: Path) -> None:
    (machine / "groups").write_text("0::/\n")
    group(machine / "mount", GIB, GIB // 2)
    parts = {"one part": GIB, "another": GIB // 2, "a small one": 100}
    with pytest.raises(memory.FastKVError) as caught:
        memory.check_fits("this", parts, torch.device("cpu"), "take less")
    assert str(caught.value) == (
        "this needs 1.5 GiB of memory (1.0 GiB of one part, 512.0 MiB of another), but cpu has 512.0 MiB left by the "
        "limit of its control group; take less"
    )
    memory.check_fits("this", parts, torch.device("cpu"), "take less", reusable=GIB + 100)
