"""Files are written in one step: whatever fails, and whatever else writes, there is the old content or the new one."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fastkv.console.files import check_writable, write_whole
from fastkv.errors import FastKVError, FaultError
from fastkv.storage import try_beside, write_atomically


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_whole(path, "earlier", "report")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FaultError, match=r"page\.html: cannot be written \(No space left on device\)") as failed:
        write_whole(path, "later", "report")
    assert failed.value.setting == "report"
    assert [each.read_text() for each in tmp_path.iterdir()] == ["earlier"]


LIMITED = """
import resource, sys
from pathlib import Path
from fastkv.storage import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_atomically(Path(sys.argv[1]), b"later" * 100_000)
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no such limits on this system")
def test_a_write_that_stops_in_the_middle_leaves_the_earlier_file(tmp_path: Path) -> None:
    """What is left in the file's buffer fails once more when it is closed: the new file is taken away all the same."""
    path = tmp_path / "page.html"
    path.write_text("earlier")
    command = [sys.executable, "-c", LIMITED, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "File too large\n"
    assert [each.read_text() for each in tmp_path.iterdir()] == ["earlier"]


def test_a_file_that_somebody_put_there_is_neither_followed_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can guess the name; if somebody did, a link there would lead to what we must not write."""
    victim, planted = tmp_path / "victim", tmp_path / ".fastkv-00.tmp"
    victim.write_text("precious")
    planted.symlink_to(victim)
    monkeypatch.setattr(secrets, "token_hex", lambda _: "00")
    for act in (lambda path: write_atomically(path, b"new"), try_beside):
        with pytest.raises(FileExistsError):
            act(tmp_path / "page.html")
    assert victim.read_text() == "precious"
    assert planted.is_symlink()


def test_two_names_are_never_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of two threads nor of two processes with one number, as containers have them."""
    names: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(str(source)), real(source, target)))
    for _ in range(2):
        write_atomically(tmp_path / "page.html", b"x")
    assert len(set(names)) == 2
    assert not any(str(os.getpid()) == part for name in names for part in name.split("."))


def test_threads_that_write_the_same_file(tmp_path: Path) -> None:
    path, failed = tmp_path / "page.html", []
    barrier = threading.Barrier(8)

    def write(letter: str) -> None:
        barrier.wait()
        try:
            for _ in range(20):
                write_atomically(path, letter.encode() * 10_000, durable=False)
                content = path.read_bytes()
                assert len(content) == 10_000
                assert len(set(content)) == 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=letter) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    """Also those that the process's mask would take from a new file."""
    path = tmp_path / "page.html"
    path.write_text("earlier")
    path.chmod(mode)
    write_atomically(path, b"later")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    """Such as that of a shell's >(…): no file takes its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe, "report")  # does not open it, which would wait for a reader
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "page", "report")
    assert os.read(reader, 100) == b"page"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_no_encoding_can_write_is_escaped(tmp_path: Path) -> None:
    write_whole(tmp_path / "page.md", f"from {os.fsdecode(bytes([0x66, 0xE9]))}", "page")
    assert (tmp_path / "page.md").read_bytes() == rb"from f\xe9"


@pytest.mark.parametrize("act", [check_writable, lambda path, setting: write_whole(path, "x", setting)])
def test_links_that_lead_in_a_circle(tmp_path: Path, act: Callable[[Path, str], None]) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with suppress(FastKVError):  # and no other error
        act(tmp_path / "a", "report")
