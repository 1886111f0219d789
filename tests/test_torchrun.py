"""fastkv-run as torchrun starts it, over gloo: rank 0 alone speaks, and when a rank ends, all do, with one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import fastkv
from fastkv import cli
from fastkv.cli import main
from fastkv.console import ranks

if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc", allow_module_level=True)

PATIENCE = 40  # seconds for what takes a few


def environment() -> dict[str, str]:
    folder = str(Path(fastkv.__file__).parent.parent)
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Started:
    """A run of fastkv-run on two ranks."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.stderr = folder / "stderr"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "-m", "fastkv", *args], stdout=subprocess.PIPE, stderr=stderr, env=environment()
            )

    @property
    def ranks(self) -> dict[int, int]:
        """The processes of the ranks that are there."""
        pid = self.process.pid
        found = {}
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found.update({int(each[5:]): int(child) for each in told if each.startswith(b"RANK=")})
        return found

    def wait_for_ranks(self) -> dict[int, int]:
        end = time.monotonic() + PATIENCE
        while len(self.ranks) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        return self.ranks

    @property
    def own_lines(self) -> list[str]:
        """What fastkv-run said; torchrun says more."""
        return [line for line in self.stderr.read_text().splitlines() if line.startswith("fastkv-run: ")]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("The access code of the quiet river is 4711. " * 12 + "The access code of the quiet river is")
    return path


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    runs: list[Started] = []

    def start(*args: str) -> Started:
        runs.append(Started(tmp_path, *args))
        return runs[-1]

    yield start
    for run in runs:
        for pid in (run.process.pid, *run.ranks.values()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()


def test_two_ranks_answer_as_one_process(started: Any, prompt_file: Path, archive_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = [prompt_file.read_text(), "A second prompt, which is short.", prompt_file.read_text()[100:]]
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": text}) + "\n" for i, text in enumerate(texts)))
    common = ["--model", str(archive_folder), "--dtype", "float32", "--device", "cpu", "--max-tokens", "8"]
    common += ["--prompts", str(prompts)]
    run = started(*common, "--output", str(tmp_path / "two.jsonl"))
    assert run.process.wait(PATIENCE) == 0
    assert not run.process.stdout.read()
    said = [line for line in run.stderr.read_text().splitlines() if "answers to" in line]
    assert len(said) == 1, said
    assert main([*common, "--output", str(tmp_path / "one.jsonl"), "--quiet"]) == 0

    def answers(name: str) -> dict[str, list[int]]:
        lines = (tmp_path / name).read_text().splitlines()
        assert len(lines) == 3
        return {record["id"]: record["token_ids"] for record in map(json.loads, lines)}

    assert answers("two.jsonl") == answers("one.jsonl")
    assert main([*common, "--output", str(tmp_path / "two.jsonl"), "--quiet"]) == 0  # which one process finds whole
    assert len(answers("two.jsonl")) == 3


@pytest.mark.parametrize("killed", [0])
def test_when_a_rank_is_killed_all_end_with_one_line(
    killed: int, started: Any, prompt_file: Path, archive_folder: Path
) -> None:
    args = ["--model", str(archive_folder), "--device", "cpu", "--prompt", str(prompt_file), "--policy", "full"]
    run = started(*args, "--max-tokens", "3000", "--ignore-eos")
    ranks = run.wait_for_ranks()
    assert os.read(run.process.stdout.fileno(), 1)  # it decodes
    os.kill(ranks[killed], signal.SIGKILL)
    assert run.process.wait(PATIENCE) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert len(run.own_lines) == 1, run.stderr.read_text()
    assert run.own_lines[0].startswith("fastkv-run: error: ")


def test_a_mistake_is_told_once(started: Any, tmp_path: Path) -> None:
    run = started("--model", str(tmp_path / "nothing"), "--prompt", str(tmp_path / "none.txt"))
    assert run.process.wait(PATIENCE) == 1  # torchrun's status for any fault of what it started
    assert len(run.own_lines) == 1, run.stderr.read_text()
    assert "none.txt" in run.own_lines[0]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun would tell the first of two; nothing else of this process changes."""
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fastkv.console.parser.begin_rank", lambda name: None)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--prompt", "-"], "--prompt: - is standard input, which the ranks cannot share"),
        (["--prompts", "-", "--output", "x"], "--prompts: - is standard input, which the ranks cannot share"),
        (["--prompt", "x", "--context", "-"], "--context: - is standard input, which the ranks cannot share"),
        (["--prompt", "x", "--report", "r.html"], "--report: does not go with torchrun"),
        (["--prompt", "x", "--cache", "c"], "--cache: does not go with torchrun"),
        (["--prompt", "x", "--save-cache", "c"], "--save-cache: does not go with torchrun"),
        (["--prompt", "x", "--speculation", "self"], "--speculation: does not go with torchrun"),
        (["--prompt", "x", "--draft-weights", "int8"], "--draft-weights: does not go with torchrun"),
        (["--prompt", "x", "--offload"], "--offload: does not go with torchrun"),
        (["--prompt", "x", "--compile"], "--compile: does not go with torchrun"),
    ],
)
def test_flags_of_one_process(two_ranks: None, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_reader_that_has_gone_does_not_end_one_rank_alone(two_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    dropped: list[bool] = []
    monkeypatch.setattr("fastkv.cli.drop_stdout", lambda: dropped.append(True))
    monkeypatch.setattr(sys, "stdout", Gone())
    cli._write("text")
    assert dropped
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(BrokenPipeError):
        cli._write("text")


def test_other_commands_run_in_one_process(two_ranks: None, capsys: pytest.CaptureFixture[str]) -> None:
    from fastkv.console.talk.command import main as chat
    from fastkv.eval.cli import main as evaluate

    for command in (lambda: chat(["--model", "m"]), lambda: evaluate(["tasks"])):
        assert command() == 2
        assert "runs in one process: start it without torchrun" in capsys.readouterr().err


def test_a_rank_that_is_not_the_first_says_nothing_more(
    two_ranks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "_is_first", lambda: False)
    assert not ranks.last_words("unheard")
    assert capsys.readouterr().err == ""
