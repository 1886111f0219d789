"""The command when its output cannot be written: one line, exit status 1, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk(archive_folder: Path, flags: list[str], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The access code of the amber gate is")
    command = [sys.executable, "-m", "fastkv", "--model", archive_folder, "--prompt", prompt, "--quiet", *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["fastkv-run: error: [Errno 28] No space left on device"]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_standard_output(archive_folder: Path) -> None:
    prompt = archive_folder.parent / "prompt.txt"
    command = f"'{sys.executable}' -m fastkv --model '{archive_folder}' --prompt '{prompt}' >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "fastkv-run: error: standard output is closed\n"
