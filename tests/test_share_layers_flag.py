"""--share-layers of fastkv-run and share_layers of a policy of fastkv-eval: what they do, tell and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FastKVError
from fastkv.cli import main
from fastkv.engine.output import Output
from fastkv.eval import cli as eval_cli
from fastkv.eval.cli_flags import PARSERS
from fastkv.eval.policy_spec import parse_policies, stored_as
from fastkv.eval.run import described
from fastkv.eval.runner import Plan, Runner
from fastkv.eval.tasks import GENERATED
from fastkv.models.files import fingerprint

PAIRS = {"pairs": [{"reader": 3, "source": 1}, {"reader": 5, "source": 1}]}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def layer_map(tmp_path: Path, archive_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the bundled model; in the folder where the commands run, with a prompt beside it."""
    monkeypatch.chdir(tmp_path)
    about = {"kind": "fastkv-share-layers", "files": fingerprint(archive_folder), "n_layers": 8}
    Path("map.json").write_text(json.dumps({**about, **PAIRS}))
    Path("other.json").write_text(json.dumps({**about, **PAIRS, "files": "0" * 16}))
    Path("p.txt").write_text("The access code of the calm owl is 9264.")
    return "map.json"


@pytest.fixture
def run(archive_folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def command(*argv: str) -> tuple[int, str, str]:
        machine = ["--model", str(archive_folder), "--dtype", "float32", "--device", "cpu", "--max-tokens", "3"]
        status = main([*machine, "--prompt", "p.txt", *argv])
        return status, *capfd.readouterr()

    return command


def test_the_command_shares_and_tells(run: Run, layer_map: str) -> None:
    status, _, err = run("--share-layers", layer_map)
    assert status == 0
    assert "shared       2 layers store no entries of their own: 3 reads 1, 5 reads 1" in err.splitlines()
    printed = json.loads(run("--share-layers", layer_map, "--json")[1])
    assert printed["shared_layers"] == [[3, 1], [5, 1]]
    assert printed["metrics"]["kv_bytes"] * 8 == printed["metrics"]["kv_full_bytes"] * 6
    plain = json.loads(run("--json")[1])
    assert plain["shared_layers"] == []
    assert "shared" not in run()[2]


def test_answers_of_another_map_are_not_taken_for_these(run: Run, layer_map: str) -> None:
    assert run("--output", "out.jsonl", "--share-layers", layer_map)[0] == 0
    status, _, err = run("--output", "out.jsonl")
    assert (status, "shared_layers [[3, 1], [5, 1]], not null" in err) == (2, True)
    assert run("--output", "out.jsonl", "--share-layers", layer_map)[0] == 0


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        (["--context", "p.txt"], "--context"),
        (["--cache", "p.txt"], "--cache"),
        (["--lossless"], "--lossless"),
        (["--speculation", "ngram"], "--speculation"),
        (["--decode-budget", "64"], "--decode-budget"),
        (["--kv-dtype", "int8"], "--kv-dtype"),
        (["--reuse-prefix", "--output", "o"], "--reuse-prefix"),
    ],
)
def test_what_does_not_go_with_it(
    run: Run, layer_map: str, monkeypatch: pytest.MonkeyPatch, flags: list[str], other: str
) -> None:
    """Told before the model is loaded."""
    monkeypatch.setattr("fastkv.cli.load_by_flags", lambda *args: pytest.fail("it is loaded"))
    status, out, err = run("--share-layers", layer_map, *flags)
    said = f"fastkv-run: error: --share-layers: does not go with {other}: leave one of them out\n"
    assert (status, out, err) == (2, "", said)


def test_a_policy_that_cannot_and_another_models_map(run: Run, layer_map: str) -> None:
    status, _, err = run("--share-layers", layer_map, "--policy", "gemfilter", "--min-tokens", "8")
    said = "--share-layers: share_layers does not go with policy gemfilter, which reads what it chooses"
    assert (status, said in err) == (2, True)
    status, _, err = run("--share-layers", "other.json")
    assert (status, "--share-layers: other.json: was made for another model" in err) == (2, True)


PLAN = Plan(tasks=(GENERATED["archive"],), lengths=(128,), depths=(0.5,), examples=1, seed=0)


def test_one_policy_of_a_run_may_share(archive_llm: LLM, layer_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = parse_policies(["full", f"full:share_layers={layer_map}"], archive_llm.config.n_layers)
    runner, real, found = Runner(archive_llm, PLAN, specs), archive_llm.generate, []

    def watched(*args: Any, **settings: Any) -> Output:
        found.append(real(*args, **settings))
        return found[-1]

    monkeypatch.setattr(archive_llm, "generate", watched)
    records = [runner.answer(runner.question(PLAN.slots()[0]), spec) for spec in specs]
    assert [out.run.shared_layers for out in found] == [(), ((3, 1), (5, 1))]
    assert records[0].kv_bytes * 6 == records[1].kv_bytes * 8
    assert archive_llm.share_layers == {}
    assert described(archive_llm, specs)[1]["shared_layers"] == ((3, 1), (5, 1))
    with pytest.raises(FastKVError, match="is the same policy as"):
        parse_policies([f"full:share_layers={layer_map}"] * 2)


def test_the_same_layers_are_the_same_policy(layer_map: str, tmp_path: Path) -> None:
    """Whatever the file is called, and wherever it is; one without pairs shares nothing."""
    content = json.loads(Path(layer_map).read_text())
    names = {"copy.json": content["pairs"], "fewer.json": content["pairs"][:1], "none.json": []}
    for name, pairs in names.items():
        (tmp_path / name).write_text(json.dumps({**content, "pairs": pairs}))
    for other in (f"./{layer_map}", str(tmp_path / "copy.json")):
        with pytest.raises(FastKVError, match=f"is the same policy as full:share_layers={layer_map}"):
            parse_policies([f"full:share_layers={layer_map}", f"full:share_layers={other}"])
    with pytest.raises(FastKVError, match="is the same policy as full;"):
        parse_policies(["full", f"full:share_layers={tmp_path / 'none.json'}"])
    parse_policies([f"full:share_layers={layer_map}", f"full:share_layers={tmp_path / 'fewer.json'}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("full:share_layers=none", "none: cannot be read"),
        ("full:share_layers=5", "5: cannot be read"),
        ("full:share_layers=other.json", "--policy full:share_layers=other.json: other.json: was made for another"),
        ("gemfilter:min_tokens=8,share_layers=map.json", "--policy gemfilter:.* does not go with policy gemfilter"),
    ],
)
def test_mistakes_of_a_policy(archive_llm: LLM, layer_map: str, text: str, said: str) -> None:
    """Found before the first question is put, and nothing is left of them."""
    with pytest.raises(FastKVError, match=said):
        Runner(archive_llm, PLAN, parse_policies([text], archive_llm.config.n_layers))
    assert (archive_llm.share_layers, archive_llm.kv_dtype) == ({}, None)


def test_what_is_set_is_undone_where_a_part_of_it_fails(archive_llm: LLM, layer_map: str) -> None:
    (spec,) = parse_policies(["full:kv_dtype=int8,share_layers=other.json"])
    with pytest.raises(FastKVError, match="another model"), stored_as(archive_llm, spec):
        pass
    assert archive_llm.kv_dtype is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--task", "archive", "--question-after"], "--question-after: share_layers, which a policy has"),
        (["turns"], "share_layers does not go with several questions about one text"),
        (["tsp-layers", "--task", "archive"], "the advice is for layers that read none other"),
        (["compare", "--task", "archive"], "--share-layers is no setting of --policy fastkv"),
    ],
    ids=lambda argv: argv[0],
)
def test_commands_that_cannot(
    archive_folder: Path, layer_map: str, capfd: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    flags = ["--model", str(archive_folder), "--length", "128", "--quiet"]
    policy = f"fastkv:share_layers={layer_map}"
    assert eval_cli.main([*argv, *flags, "--policy", policy]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "command", [name for name, made in PARSERS.items() if "--policy" in made()._option_string_actions]
)
def test_no_command_drops_how_a_policy_s_entries_are_stored(
    command: str, archive_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each command with --policy asks under it, or says in one line what to give instead."""
    words = [*([] if command == "tasks" else [command]), "--task", "kv" if command == "turns" else "archive"]
    stored, sets = list[str | None](), LLM.kv_dtype.fset

    def noted(llm: LLM, kv_dtype: str | None) -> None:
        stored.append(kv_dtype)
        sets(llm, kv_dtype)

    monkeypatch.setattr(LLM, "kv_dtype", LLM.kv_dtype.setter(noted))
    sizes = ["--policy", "fastkv:kv_dtype=int8", "--length", "512", "--examples", "1", "--max-tokens", "2", "--quiet"]
    status = eval_cli.main([*words, "--model", str(archive_folder), "--device", "cpu", *sizes])
    refused = "kv_dtype here is that of one policy among others: take --kv-dtype int8" in capfd.readouterr().err
    assert (status, refused, "int8" in stored) == ((2, True, False) if command == "tsp-layers" else (0, False, True))
