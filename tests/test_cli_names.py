"""Names of files that are not UTF-8, which Python hands on as halves of surrogate pairs: they work, and can be told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastkv import LLM, FastKVError
from fastkv.cli import main
from fastkv.eval.cli import main as evaluate

NAME, SHOWN = os.fsdecode(b"caf\xe9"), "caf\\xe9"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in a folder with a prompt of that name: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    try:
        Path(f"{NAME}.txt").write_text("The access code of the old mill is 1111.")
    except OSError:
        pytest.skip("this file system takes no such names")

    def call(command: Callable[[list[str]], int], *argv: str) -> tuple[int, str, str]:
        status = command(list(argv))
        return status, *capsys.readouterr()

    return call


def test_fastkv_run_reads_and_writes_them(run: Run, archive_folder: Path) -> None:
    """The records and the page are UTF-8 all the same, and the second run finds what the first one wrote."""
    flags = ["--model", str(archive_folder), "--device", "cpu", "--max-tokens", "2", "--prompt", f"{NAME}.txt"]
    assert run(main, *flags, "--report", f"{NAME}.html")[0] == 0
    Path(f"{NAME}.html").read_text("utf-8")
    status, _, err = run(main, *flags, "--output", f"{NAME}.jsonl")
    assert (status, err[:30]) == (0, f"1 answer to {SHOWN}.jsonl: 2 to"[:30])
    assert json.loads(Path(f"{NAME}.jsonl").read_text("utf-8"))["id"] == f"{SHOWN}.txt"
    assert run(main, *flags, "--output", f"{NAME}.jsonl")[2].endswith("1 was there already\n")


def test_fastkv_eval_reads_and_writes_them(run: Run, archive_folder: Path) -> None:
    """In a policy's setting, too, which stands in the records, in tables and on a page."""
    scores, model = f"{NAME}.json", ["--model", str(archive_folder), "--device", "cpu"]
    Path(scores).write_text(json.dumps({"scores": [[1, 0.5]] * 8}))
    asked = ["--length", "128", "--depth", "0.5", "--examples", "1", "--max-tokens", "1"]
    files = ["--output", f"{NAME}.jsonl", "--page", f"{NAME}.md", "--policy", "headkv", "--head-scores", scores]
    status, out, err = run(evaluate, "compare", *model, *asked, *files)
    assert (status, err.splitlines()[-1]) == (0, f"wrote {SHOWN}.md")
    out.encode("ascii", "backslashreplace")
    assert f"--page '{SHOWN}.md'" in Path(f"{NAME}.md").read_text("utf-8")
    assert len(Path(f"{NAME}.jsonl").read_text("utf-8").splitlines()) == 3
    task = ["--task", "niah_single", "--policy", f"headkv:head_scores={scores}", "--output", f"{NAME}2.jsonl"]
    for _ in range(2):
        status, out, err = run(evaluate, *model, *asked, *task)
        assert (status, f"headkv:head_scores={SHOWN}.json" in out) == (0, True)
    assert err == f"{SHOWN}2.jsonl: continues after 1 record\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", f"{NAME}/none"],
        ["--prompts", NAME],
        ["--policy-file", NAME],
        ["--context", NAME],
        ["--cache", NAME],
        ["--context", f"{NAME}.txt", "--save-cache", f"{NAME}/none/out"],
        ["--output", f"{NAME}/none/out"],
        ["--report", f"{NAME}/none/out"],
        ["--revision", NAME],
        ["--stop", NAME],
        ["--chat", "--system", NAME],
        ["--policy", NAME],
        ["--device", NAME],
        ["--threads", NAME],
        ["--policy", "headkv", "--head-scores", NAME],
        [NAME],
        ["--model", NAME],
    ],
    ids=lambda flags: flags[0].encode("ascii", "replace").decode(),
)
def test_a_complaint_about_one_is_one_printable_line(run: Run, archive_folder: Path, flags: list[str]) -> None:
    given = ["--model", str(archive_folder), *flags]
    prompt = [] if flags[0] in ("--prompt", "--prompts") else ["--prompt", f"{NAME}.txt"]
    status, out, err = run(main, *given, *prompt)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err[:-1].isprintable()


def test_under_a_locale_without_such_characters(tmp_path: Path) -> None:
    """As a shell gives them, in bytes."""
    flags = [b"--model", b"none", b"--prompt", b"caf\xe9 \xc3\xa9"]
    strict = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [os.fsencode(sys.executable), b"-m", b"fastkv.cli", *flags]
    ended = subprocess.run(command, capture_output=True, env=strict, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr.startswith(b"fastkv-run: error: --prompt caf\\xe9 \\x")
    assert ended.stderr.endswith(b": cannot be read (No such file or directory)\n")


def test_a_model_folder_of_such_a_name_is_refused(run: Run, archive_folder: Path) -> None:
    """Neither the tokenizers' nor the weights' library takes it. A link to it is read."""
    Path(NAME).symlink_to(archive_folder)
    with pytest.raises(FastKVError, match="take no such name; rename it, or link to it"):
        LLM(NAME)
    Path("link").symlink_to(NAME)
    assert LLM("link", device="cpu").tokenizer is not None
