"""Policy files: what fastkv-run takes from them, what it says of that, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkv.cli import main
from fastkv.console.machine import fingerprint
from fastkv.console.policy_file import remember, write_policy_file
from fastkv.errors import FastKVError
from fastkv.storage import cache_folder as folder_of_user
from fastkv.storage import check_cache_folder

Call = Callable[..., tuple[int, str, str]]
SETTINGS = {"kv_retention": 0.25, "min_tokens": 12, "tsp_layer": 1}


@pytest.fixture
def content(archive_folder: Path) -> dict[str, Any]:
    files = fingerprint(archive_folder)
    return {"date": "2026-11-27", "files": files, "policy": "fastkv", "settings": dict(SETTINGS)}


@pytest.fixture
def run(archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """run(*argv, model=…): exit status, stdout and stderr of fastkv-run on a short prompt."""

    def call(*argv: str, model: Path = archive_folder) -> tuple[int, str, str]:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("The clerk found two letters. " * 8)
        status = main(["--model", str(model), "--prompt", str(prompt), "--max-tokens", "1", *argv])
        return status, *capsys.readouterr()

    return call


def used(out: str) -> dict[str, Any]:
    """The policy that --json tells."""
    found: dict[str, Any] = json.loads(out)["policy"]
    return found


def test_what_is_remembered_of_a_model_is_used_and_told(run: Call, content: dict[str, Any]) -> None:
    defaults = used(run("--json")[1])
    remember(content)
    status, out, err = run("--json")
    assert status == 0
    assert used(out) == {**defaults, **SETTINGS}
    line = next(line for line in err.splitlines() if line.startswith("tuned"))
    assert line == (
        "tuned        on 2026-11-27 for this model: fastkv, kv_retention 0.25, min_tokens 12, tsp_layer 1; "
        "--policy fastkv for the defaults"
    )


def test_a_policy_given_wins_and_a_setting_given_replaces_that_one(run: Call, content: dict[str, Any]) -> None:
    remember(content)
    _, out, err = run("--json", "--policy", "fastkv")
    assert used(out)["kv_retention"] == 0.1
    assert "tuned" not in err
    _, out, err = run("--json", "--kv-retention", "0.5")
    assert (used(out)["kv_retention"], used(out)["tsp_layer"]) == (0.5, 1)
    assert "kv_retention 0.5, min_tokens 12" in err


def test_another_model_has_nothing_remembered(run: Call, content: dict[str, Any], archive_folder: Path) -> None:
    remember({**content, "files": "0" * 16})
    status, out, err = run("--json")
    assert (status, used(out)["kv_retention"]) == (0, 0.1)
    assert "tuned" not in err


def test_a_file_that_is_named_wins_over_what_is_remembered(run: Call, content: dict[str, Any], tmp_path: Path) -> None:
    remember(content)
    path = tmp_path / "mine.json"
    write_policy_file(path, {**content, "policy": "snapkv", "settings": {"kv_retention": 0.75}}, "output")
    _, out, err = run("--json", "--policy-file", str(path))
    assert (used(out)["name"], used(out)["kv_retention"]) == ("snapkv", 0.75)
    assert f"({path}): snapkv, kv_retention 0.75" in err


def test_many_prompts_say_it_too(run: Call, content: dict[str, Any], tmp_path: Path) -> None:
    remember(content)
    path = tmp_path / "answers.jsonl"
    _, _, err = run("--output", str(path))
    assert err.startswith("tuned        on 2026-11-27 for this model")
    assert json.loads(path.read_text())["policy"]["min_tokens"] == 12
    assert run("--output", str(path), "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "fastkv-head-scores"}, "is of the kind 'fastkv-head-scores', not 'fastkv-policy'"),
        ({"policy": "best"}, "policy must be one of fastkv, "),
        ({"policy": None}, "has no text under 'policy'"),
        ({"settings": [1]}, "has no object under 'settings'"),
        ({"settings": {"reech": 3}}, "'reech' is no setting of policy fastkv"),
        ({"settings": {"kv_retention": 2}}, "kv_retention must be a number above 0 and at most 1, not 2"),
        ({"settings": {"tsp_layer": 99}}, "tsp_layer must be below the model's number of layers (8), not 99"),
        ({"files": "0" * 16}, "was made for another model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    run: Call, content: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    path = tmp_path / "policy.json"
    write_policy_file(path, {**content, **change}, "output")
    status, out, err = run("--policy-file", str(path))
    assert (status, out) == (2, "")
    assert f"{path}: " in err
    assert says in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_json_or_not_there_is_refused(run: Call, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    assert f"--policy-file: {path}: cannot be read" in run("--policy-file", str(path))[2]
    path.write_text("{")
    assert f"--policy-file: {path}: is no JSON object with kind, date" in run("--policy-file", str(path))[2]


def test_a_broken_remembered_file_is_told_with_the_way_out(run: Call, content: dict[str, Any]) -> None:
    path = remember(content)
    path.write_text("[]")
    status, _, err = run()
    assert status == 2
    assert err.startswith(f"fastkv-run: error: {path}: is no JSON object")
    assert err.endswith("; delete this file, or give --policy fastkv\n")
    assert run("--policy", "fastkv")[0] == 0


def test_a_policy_and_a_file_are_two_policies(run: Call, tmp_path: Path) -> None:
    status, _, err = run("--policy", "full", "--policy-file", str(tmp_path / "policy.json"))
    assert (status, err) == (2, "fastkv-run: error: --policy-file names a policy already: leave it or --policy out\n")


def test_a_setting_given_that_the_policy_of_the_file_lacks(run: Call, content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    write_policy_file(path, {**content, "policy": "snapkv", "settings": {}}, "output")
    assert "--tsp-layer is no setting of --policy snapkv" in run("--policy-file", str(path), "--tsp-layer", "2")[2]


def test_a_model_that_cannot_be_read_says_so_itself(run: Call, content: dict[str, Any], tmp_path: Path) -> None:
    remember(content)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "nowhere")
    status, _, err = run(model=tmp_path / "model")
    assert status == 2
    assert "config.json" in err


def test_the_fingerprint_is_that_of_a_copy(content: dict[str, Any], archive_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(archive_folder, tmp_path / "copy")
    assert fingerprint(copy) == content["files"]


def test_where_the_cache_folder_is(monkeypatch: pytest.MonkeyPatch, cache_folder: Path, tmp_path: Path) -> None:
    assert folder_of_user() == cache_folder  # what the fixture says for every test
    monkeypatch.setenv("FASTKV_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder_of_user() == tmp_path / "fastkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of_user() == tmp_path / ".cache" / "fastkv"


def test_a_cache_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(FastKVError, match="is no folder; set FASTKV_CACHE to another one"):
        check_cache_folder()
