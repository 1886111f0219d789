"""fastkv-batch on a real Ray cluster of this machine, with two workers, one of which is killed twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv.console.batch import pipeline
from fastkv.console.batch.command import main

pytest.importorskip("ray", reason="ray is not installed")

N_PROMPTS, SHARD_SIZE = 60, 5
VICTIM = 4  # the shard that a worker is killed over, twice: some are done before it, and some after it


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of the command. Ray names sockets in its folder, so that its name must be short."""
    folder = tempfile.mkdtemp(prefix="ray")
    ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    yield {**ours, "RAY_TMPDIR": folder, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    shutil.rmtree(folder, ignore_errors=True)


def command(folder: Path) -> list[str]:
    archive = ROOT / "examples" / "archive" / "model"
    machine = ["--device", "cpu", "--dtype", "float32", "--workers", "2", "--shard-size", str(SHARD_SIZE)]
    files = ["--prompts", str(folder / "in.jsonl"), "--output", str(folder / "out")]
    asked = ["--max-tokens", "60", "--ignore-eos"]
    return [sys.executable, "-m", "fastkv.console.batch.command", "--model", str(archive), *files, *machine, *asked]


def records(folder: Path) -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted((folder / "out").glob("shard-*.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def kill_twice(begun: Path, process: subprocess.Popen[str]) -> list[int]:
    """Kill the worker that begins a shard, and the one that begins it again. begun: where they say so."""
    killed: list[int] = []
    while len(killed) < 2 and process.poll() is None:
        lines = begun.read_text().splitlines(keepends=True) if begun.exists() else []
        if len(lines) > len(killed) and lines[-1].endswith("\n"):
            killed.append(int(lines[len(killed)].split()[1]))
            os.kill(killed[-1], signal.SIGKILL)
        time.sleep(0.002)
    return killed


def test_a_worker_that_is_killed_twice_loses_nothing(
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every prompt is answered once, in order, and what fails is a record. The same command again does nothing."""
    texts = [f"The code of the old mill is {n}. It is" for n in range(N_PROMPTS)]
    of_victim = slice(VICTIM * SHARD_SIZE, (VICTIM + 1) * SHARD_SIZE)
    texts[of_victim] = ["A calm owl. " * 400 + text for text in texts[of_victim]]  # which leaves time to kill
    lines = [json.dumps({"id": f"p{n}", "prompt": text}) for n, text in enumerate(texts)]
    lines[7] = "{no json"
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command(tmp_path), **pipes) as process:
        killed = kill_twice(tmp_path / "out" / ".begun" / f"shard-{VICTIM:06d}.jsonl", process)
        out, err = process.communicate()
    assert (process.returncode, out, len(set(killed))) == (0, "", 2), err
    assert len(err.splitlines()) == 1  # nothing of Ray's own
    assert err.startswith(f"{N_PROMPTS - 1} answers to ")
    assert '; 1 prompt failed: see "error" in their records; 2 workers died, and their work was done again' in err
    found = records(tmp_path)
    assert [record["line"] for record in found] == list(range(1, N_PROMPTS + 1))
    assert [record["id"] for record in found if "error" not in record] == [f"p{n}" for n in range(N_PROMPTS) if n != 7]
    assert all(len(record["token_ids"]) == 60 for record in found if "error" not in record)
    assert not list((tmp_path / "out").glob(".*"))
    for name in ("run", "check_ray"):
        monkeypatch.setattr(pipeline, name, None)  # neither is asked for
    assert main(command(tmp_path)[3:]) == 0
    assert capsys.readouterr().err.endswith(f": 0 tokens in 0.0 s; {N_PROMPTS} were there already\n")
    assert records(tmp_path) == found
