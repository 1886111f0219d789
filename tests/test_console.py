"""What the commands share: one writer to a file at a time, the progress line, and how a command ends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import FastKVError
from fastkv.console import jsonl
from fastkv.console import lock as lock_module
from fastkv.console import progress as progress_module
from fastkv.console.files import check_replaceable, write_whole
from fastkv.console.jsonl import RecordFile, check_output, difference
from fastkv.console.lock import holder, lock
from fastkv.console.parser import Parser, file_name, file_path, guarded, say
from fastkv.console.picture import style
from fastkv.console.progress import ProgressLine, clock
from fastkv.errors import FaultError

HOLDS = """
import sys
from pathlib import Path
from fastkv.console.jsonl import RecordFile
with RecordFile(Path(sys.argv[1])) as file:
    file.append({"from": "the first"})
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has written a record to out.jsonl, and holds it until it is told to end."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.communicate()


@pytest.mark.parametrize("act", [RecordFile, check_output])
def test_a_file_has_one_writer(another: subprocess.Popen[str], tmp_path: Path, act: Callable[[Path], Any]) -> None:
    """Its process is named where the system tells; when it ends, the file is free, and what it wrote is there."""
    path = tmp_path / "out.jsonl"
    with pytest.raises(FastKVError, match="is writing to it; wait until it has ended, or name another file") as refused:
        act(path)
    assert refused.value.setting == "output"
    if Path("/proc/locks").exists():
        assert f"out.jsonl: process {another.pid} ({sys.executable}" in str(refused.value)
    another.communicate()
    check_output(path)
    with RecordFile(path) as file:
        assert file.objects == [{"from": "the first"}]
        file.append({"from": "the second"})
    assert len(path.read_bytes().splitlines()) == 2


def test_a_dead_writer_holds_nothing(another: subprocess.Popen[str], tmp_path: Path) -> None:
    another.send_signal(signal.SIGKILL)
    another.wait()
    with RecordFile(tmp_path / "out.jsonl") as file:
        assert file.objects == [{"from": "the first"}]


def test_a_file_that_is_refused_is_free_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("no record\n")
    for _ in range(2):
        with pytest.raises(FastKVError, match=r"out\.jsonl, line 1: is no record of such a run; name another file"):
            RecordFile(path)
    with path.open("rb") as file:
        assert lock(file)


def test_without_locks_every_process_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none says so: that must not keep anybody from working."""
    if lock_module.fcntl is None:
        pytest.skip("no fcntl on this system")

    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    with (tmp_path / "file").open("wb") as file:
        assert lock(file)
        assert holder(file) == "another process"


def test_a_tail_stays_until_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": "2')
    with RecordFile(path) as file:
        assert (file.objects, file.tail) == ([{"id": "1"}], b'{"id": "2')
        assert path.read_bytes() == b'{"id": "1"}\n{"id": "2'
        file.drop_tail()
        file.append({"id": "é"})
        assert path.read_text("utf-8") == '{"id": "1"}\n{"id": "é"}\n'  # before it is closed


def test_a_look_at_the_output_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither makes the file, which another process may make meanwhile, nor keeps the one that writes from it."""
    path, gone, real = tmp_path / "out.jsonl", [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda file, **how: (gone.append(file.name), real(file, **how)))
    check_output(path)
    assert list(tmp_path.iterdir()) == []
    assert path.name not in gone
    path.touch()
    with path.open("rb") as one, path.open("rb") as other:
        assert lock(one, shared=True)
        check_output(path)
        assert lock(other, shared=True)
        assert not lock(other)
        threading.Timer(0.05, one.close).start()
        other.close()
        with RecordFile(path) as file:  # waits for a moment
            file.append({"id": "1"})
    assert path.read_text() == '{"id": "1"}\n'


def test_a_file_that_was_deleted_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else records would go into a file that has no name any more."""
    path, real = tmp_path / "out.jsonl", jsonl.lock

    def slow(file: Any) -> bool:
        path.unlink()
        monkeypatch.setattr(jsonl, "lock", real)
        return real(file)

    monkeypatch.setattr(jsonl, "lock", slow)
    with RecordFile(path) as file:
        file.append({"id": "1"})
    assert path.read_text() == '{"id": "1"}\n'


def test_a_record_that_does_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of it was written goes, so that the file is whole, and the complaint names it."""
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as file:
        file.append({"id": "1"})
        real = jsonl.FileIO.write

        def full(self: Any, data: bytes) -> int:
            if len(data) < 10:
                raise OSError(28, "No space left on device")
            return real(self, data[:5])

        monkeypatch.setattr(file, "_file", type("Full", (jsonl.FileIO,), {"write": full})(path, "a+"))
        with pytest.raises(FaultError, match=r"out\.jsonl: cannot be written \(No space left on device\)"):
            file.append({"id": "2"})
    assert path.read_text() == '{"id": "1"}\n'


def test_a_record_is_utf8_whatever_it_holds(tmp_path: Path) -> None:
    with RecordFile(tmp_path / "out.jsonl") as file:
        file.append({"id": "é"})
        file.append({"id": "\udce9"})
    assert (tmp_path / "out.jsonl").read_text("utf-8").splitlines() == ['{"id": "é"}', '{"id": "\\udce9"}']
    with RecordFile(tmp_path / "out.jsonl") as file:
        assert [each["id"] for each in file.objects] == ["é", "\udce9"]


def test_of_long_values_the_part_that_differs_is_shown() -> None:
    assert difference(1, None) == "1, not null"
    text = difference(list(range(200)), [*range(199), "x"])
    assert text.startswith("…")
    assert "199], not …" in text
    assert len(text) < 200


def test_a_file_that_could_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before hours of work, and nothing is left beside it. Root may write anywhere, so open is asked."""
    check_replaceable(tmp_path / "new", "page")
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "new", "text", "page")
    check_replaceable(tmp_path / "new", "page")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["text"]
    with pytest.raises(FastKVError, match="is no ordinary file"):
        check_replaceable(tmp_path, "page")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    for act in (lambda path: check_replaceable(path, "page"), lambda path: write_whole(path, "x", "page")):
        with pytest.raises(FastKVError, match=r"new: cannot be written \(Permission denied\)") as refused:
            act(tmp_path / "new")
        assert refused.value.setting == "page"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands still until it is set."""
    time = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: time[0])
    return time


def test_the_progress_line(now: list[float]) -> None:
    """Time left by what this run has done, not by what was there before it; the line is gone at the end."""
    stream = Terminal()
    with ProgressLine(stream, done=40) as line:
        for done in (41, 42):
            now[0] += 2.0
            line.show(f"{done} of 52", done, 52, "   full 50.0 %")
        assert stream.getvalue().split("\r")[-1].startswith("42 of 52, 20 s left   full 50.0 %")
    assert stream.getvalue().endswith("\r\x1b[K")


def test_a_progress_line_counts_each_phase_anew(now: list[float]) -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    now[0] = 100.0
    line.show("measuring", 0, 9)
    assert stream.getvalue() == "\rmeasuring\x1b[K"
    now[0] = 110.0
    line.show("measuring", 1, 9)
    assert stream.getvalue().endswith("\rmeasuring, 1:20 min left\x1b[K")
    line.clear()
    line.clear()
    assert stream.getvalue().count("\r\x1b[K") == 1


def test_what_is_short_shows_no_progress(now: list[float]) -> None:
    stream = Terminal()
    with ProgressLine(stream) as line:
        now[0] = 0.9
        line.show("loading", 9, 10)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_no_progress_without_a_terminal(now: list[float], stream: io.StringIO | None) -> None:
    with ProgressLine(stream) as line:
        now[0] = 5.0
        line.show("loading", 1, 2)
    assert stream is None or stream.getvalue() == ""


def test_a_progress_line_makes_way_for_what_is_said(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where others say it: a warning, or that something is compiled, in the middle of what the line tells of."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressLine(stream) as line:
        now[0] = 5.0
        line.show("1 of 2", 1, 2)
        say("a warning")
        assert stream.getvalue().endswith("\r\x1b[Ka warning\n")
        say("another")
        assert stream.getvalue().endswith("a warning\nanother\n")
        now[0] = 10.0
        line.show("2 of 2", 2, 2)
    assert stream.getvalue().endswith("2 of 2, 0 s left\x1b[K\r\x1b[K")


def test_a_long_progress_line_does_not_wrap(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    now[0], line = 5.0, ProgressLine(stream)
    now[0] = 10.0
    line.show("x" * 50, 1, 2)
    assert stream.getvalue() == "\r" + "x" * 19 + "\x1b[K"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (187, "3:07 min"), (7500, "2:05 h")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "status", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 130, 130, ""),
        (raises(KeyboardInterrupt()), 130, ""),
        (raises(FastKVError("wrong")), 2, "some: error: wrong\n"),
        (raises(FastKVError("wrong", setting="max_tokens")), 2, "some: error: --max-tokens: wrong\n"),
        (raises(FastKVError("wrong", setting="other")), 2, "some: error: wrong\n"),
        (lambda: Parser(prog="some").parse_args(["--x"]) and None, 2, "some: error: unrecognized arguments: --x\n"),
    ],
)
def test_how_a_command_ends(
    work: Callable[[], int | None], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded("some", work, ["max_tokens"]) == status
    assert capsys.readouterr() == ("", line)


def test_thirty_lines_look_different() -> None:
    looks = [style(index) for index in range(30)]
    assert len(set(looks)) == 30
    assert len({colour for colour, _ in looks[:12]}) == len({marker for _, marker in looks[:12]}) == 12


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        ("--version >/dev/full", 1, "fastkv-run: error: [Errno 28] No space left on device\n"),
        ("--version >&- 2>&-", 0, ""),
        ("--prompt none 2>&-", 2, ""),
        ("--prompt none 2>/dev/full", 2, ""),
        ("--prompt none >&-", 2, "fastkv-run: error: the following arguments are required: --model\n"),
        ("--prompt pyproject.toml --model none >&-", 1, "fastkv-run: error: standard output is closed\n"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_streams_that_are_full_or_closed(redirected: str, status: int, said: str) -> None:
    """One line at most, and an exit status of our own: never a traceback, nor Python's words at exit."""
    script = f'exec "$0" -m fastkv.cli {redirected}'
    ended = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", said)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """The next file that is opened would: then what a library prints goes into the user's results."""
    script = "exec \"$0\" -c \"from fastkv.console.parser import guarded; guarded('x', lambda: print(open('f', 'w')"
    script += ".fileno(), file=open('n', 'w')))\" <&- >&- 2>&-"
    subprocess.run(["sh", "-c", script, sys.executable], cwd=tmp_path, check=True)
    assert int((tmp_path / "n").read_text()) > 2


def test_the_name_of_a_file_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a\0b", "x" * 10**6):
        with pytest.raises(ArgumentTypeError, match="no file can be named"):
            file_name(text)
    assert file_path("a/b") == Path("a/b")


def test_a_complaint_about_the_command_line_is_short() -> None:
    parser = Parser(prog="some")
    parser.add_argument("--n", type=int)
    for words in (["--n", "9" * 5000], ["x" * 10**6], ["--" + "x" * 10**6]):
        with pytest.raises(FastKVError) as refused:
            parser.parse_args(words)
        assert len(str(refused.value)) <= 300


def test_what_is_said_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """A name of the user's may hold any character; figures used to print it as it is."""
    say("1 answer to \x1b[2J\x96.jsonl")
    assert capsys.readouterr().err == "1 answer to  [2J .jsonl\n"
