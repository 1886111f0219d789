"""The command fastkv-eval: a run of the bundled model, continued after Ctrl-C, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM
from fastkv.console.machine import fingerprint
from fastkv.eval.cli import main
from fastkv.eval.tasks import NAMES

MODEL = str(ROOT / "examples" / "archive" / "model")
SMALL = ["--model", MODEL, "--task", "archive", "--length", "512", "--depth", "0.5", "1", "--examples", "2", "--quiet"]


def test_the_bundled_model_finds_its_codes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Through a full cache and through a tenth of it, and the file says all that the table is made of."""
    pytest.importorskip("matplotlib")
    path, plots = tmp_path / "run.jsonl", tmp_path / "plots"
    arguments = [
        *SMALL,
        "--dtype",
        "float32",
        "--policy",
        "full",
        "--policy",
        "fastkv:min_tokens=8",
        "--output",
        str(path),
    ]
    assert main([*arguments, "--plots", str(plots)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    right = "100.0 (51.0 – 100.0)"
    assert f"| archive | 512 | 4 | {right} | {right} | 0.0 (−49.0 to +49.0) |" in out
    header, *records = map(json.loads, path.read_text().splitlines())
    assert (header["tasks"], header["lengths"], header["depths"]) == (["archive"], [512], [0.5, 1.0])
    assert [policy["name"] for policy in header["policies"]] == ["full", "fastkv"]
    assert [record["score"] for record in records] == [1.0] * 8
    assert all(record["prediction"].split(".")[0].strip() == record["answers"][0] for record in records)
    shares = [record["kv_entries"] / record["kv_full_entries"] for record in records]
    assert [record["policy"].split(":")[0] for record in records] == 2 * ["full", "fastkv", "fastkv", "full"]
    assert shares == pytest.approx(2 * [1.0, 0.1, 0.1, 1.0], abs=0.003)
    assert sorted(file.name for file in plots.iterdir()) == ["accuracy.png", "needle-archive.png"]
    # The same command asks nothing again, and says the same.
    before = path.read_bytes()
    assert main(arguments) == 0
    assert capfd.readouterr().out == out
    assert path.read_bytes() == before


def test_ctrl_c_keeps_everything(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 130, the table so far, and a word on how to continue; then the rest, each question once."""
    path = str(tmp_path / "run.jsonl")
    arguments = [*SMALL[:-1], "--output", path]  # not quiet
    generate, calls = LLM.generate, []

    def interrupted(self: LLM, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:  # the first one is the warm-up
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert main(arguments) == 130
    out, err = capfd.readouterr()
    assert "| archive | 512 | 1 |" in out
    assert f"interrupted with 5 answers to go: the same command continues in {path}\n" in err
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == f"{path}: continues after 3 records\n"
    assert "| archive | 512 | 4 |" in out
    assert len(calls) == 5 + 1 + 5  # another warm-up


@pytest.fixture
def longbench(tmp_path: Path) -> Path:
    """A copy of LongBench in miniature: the bundled model's own words, so that it has something to say."""
    told = " ".join(
        f"The access code of the {one} is {code}." for one, code in (("calm owl", 5831), ("bold fox", 1204))
    )
    asked = {"input": "The access code of the calm owl is", "answers": ["5831"], "all_classes": ["5831", "1204"]}
    for name, context in (("qasper", told), ("trec", f"{told} " * 40)):
        row = json.dumps({**asked, "context": context})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * (3 if name == "trec" else 2))
    templates = dict.fromkeys(("qasper", "trec"), "{context}\nQuestion: {input}")
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(templates))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(templates, 8)))
    return tmp_path


def test_longbench(capfd: pytest.CaptureFixture[str], longbench: Path, tmp_path: Path) -> None:
    """Each dataset's whole file; what was cut is told; the average is that of the datasets, as LongBench has it."""
    path = tmp_path / "run.jsonl"
    arguments = ["--model", MODEL, "--task", "longbench", "--longbench", str(longbench), "--longbench-tokens", "300"]
    assert main([*arguments, "--dtype", "float32", "--policy", "full", "--output", str(path)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    header, *records = map(json.loads, path.read_text().splitlines())
    assert (header["lengths"], header["longbench_examples"], header["longbench_tokens"]) == ([], None, 300)
    assert [(r["id"], r["length"], r["cut"]) for r in records] == [
        ("longbench:qasper/0", None, False),
        ("longbench:trec/0", None, True),
        ("longbench:qasper/1", None, False),
        ("longbench:trec/1", None, True),
        ("longbench:trec/2", None, True),
    ]
    assert all(record["prompt_tokens"] <= 300 for record in records)
    assert {record["score"] for record in records} == {1.0}
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in out.splitlines() if row.startswith("| longbench")]
    assert rows == [
        ["longbench:qasper", "own", "2"],
        ["longbench:trec", "own", "3"],
        ["longbench, mean of 2", "own", "5"],
    ]
    assert "3 of 5 LongBench prompts were too long and lost their middle (trec 3 of 3)." in out
    few = [*arguments[:-2], "--examples", "1", "--policy", "full"]
    assert main(few) == 0
    out, _ = capfd.readouterr()
    assert "0 of 2 LongBench prompts were too long and lost their middle." in out


def test_the_list_of_tasks(capfd: pytest.CaptureFixture[str]) -> None:
    """One line each, and nothing else is needed."""
    with pytest.raises(SystemExit) as left:
        main(["--list"])
    assert left.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*NAMES, "longbench"]
    assert all(len(line.split()) > 3 for line in lines)


Complaint = Callable[..., None]


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Complaint:
    """complaint(*argv, says=...) runs the command and holds it to the rules for mistakes."""

    def run(*argv: str, says: str) -> None:
        try:
            status: Any = main(list(argv))
        except SystemExit as left:  # the parser's own complaints
            status = left.code
        out, err = capfd.readouterr()
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith("fastkv-eval: error: ")
        assert says in err

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "--model"),
        ("--model {model}", "--task"),
        ("layers --model {model}", "no command 'layers'"),
        ("--model no/such/folder --task archive", "no/such/folder"),
        ("--model {tiny} --task archive", "--model: the model has no tokenizer"),
        ("--model {model} --task archive vtt", "--task: task must be one of niah_single"),
        ("--model {model} --task archive --policy fast", "--policy fast: policy must be one of"),
        ("--model {model} --task archive --policy fastkv:kvretention=1", "--policy fastkv:kvretention=1:"),
        ("--model {model} --task archive --policy fastkv:tsp_layer=8", "tsp_layer must be below"),
        ("--model {model} --task archive --length 0", "--length"),
        ("--model {model} --task archive --length many", "--length"),
        ("--model {model} --task archive --length 8190", "--length: 8190 tokens and an answer of 8"),
        ("--model {model} --task vt --length 100", "--length: 100 tokens are too short for task vt"),
        ("--model {model} --task archive --depth 1.5", "--depth"),
        ("--model {model} --task archive --depth nan", "--depth"),
        ("--model {model} --task archive --examples 0", "--examples"),
        ("--model {model} --task archive --max-tokens 0", "--max-tokens"),
        ("--model {model} --task archive --threads 0", "--threads"),
        ("--model {model} --task archive --device tpu", "--device"),
        ("--model {model} --task archive --dtype int8", "--dtype"),
        ("--model {model} --task archive --chat", "--chat"),
        ("--model {model} --task qa", "--qa-file"),
        ("--model {model} --task vt --qa-file x", "--qa-file is for --task qa"),
        ("--model {model} --task qa --qa-file missing.jsonl", "--qa-file: missing.jsonl: cannot be read"),
        ("--model {model} --task longbench", "--task: task longbench needs a copy of LongBench"),
        ("--model {model} --task longbench:qasper", "--task: task longbench needs a copy of LongBench"),
        ("--model {model} --task vt --longbench x", "--longbench is for --task longbench"),
        ("--model {model} --task longbench --longbench missing", "--longbench: missing: there is no such folder"),
        ("--model {model} --task longbench --longbench {model}", "--longbench: {model}: has no dataset2prompt.json"),
        ("--model {model} --task longbench:quasar --longbench {longbench}", "--task: longbench:quasar: is no dataset"),
        ("--model {model} --task longbench:lcc --longbench {longbench}", "--longbench: {longbench}: has no lcc.jsonl"),
        ("--model {model} --task longbench --longbench {longbench} --length 512", "--length: LongBench's prompts have"),
        ("--model {model} --task vt --longbench-tokens 512", "--longbench-tokens: is for --task longbench"),
        (
            "--model {model} --task longbench --longbench {longbench} --longbench-tokens 8190",
            "--longbench-tokens: 8190 t",
        ),
        ("--model {model} --task longbench --longbench {longbench} --longbench-tokens 1", "1 tokens are too short"),
        (
            "--model {model} --task longbench --longbench {longbench} --max-tokens 9000",
            "--max-tokens: an answer of 90",
        ),
        ("--model {model} --task archive --output missing/run.jsonl", "--output: missing/run.jsonl: cannot be written"),
        ("--model {model} --task archive --length 200 --output {model}", "--output: {model}: cannot be written"),
        ("--model {model} --task archive --unknown", "--unknown"),
    ],
)
def test_mistakes(complaint: Complaint, tiny_folder: Path, longbench: Path, arguments: str, says: str) -> None:
    places = {"model": MODEL, "tiny": tiny_folder, "longbench": longbench}
    complaint(*arguments.format(**places).split(), says=says.format(**places))


def test_another_run_s_file(complaint: Complaint, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "run.jsonl")
    few = [*SMALL[:4], "--length", "200", "--depth", "0", "--examples", "1", "--output", path]
    assert main(few) == 0
    capfd.readouterr()
    complaint(*few, "--seed", "3", says="is another run's, with seed 0, not 3")
    complaint(*few, "--policy", "full", says="policies")


def test_plots_without_matplotlib(complaint: Complaint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told before the run, not after it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    complaint(*SMALL, "--plots", str(tmp_path), says='--plots needs matplotlib: pip install "fastkv[eval]"')


def test_help_and_mistakes_import_no_torch() -> None:
    """They answer at once; only a run that can start pays for the imports."""
    code = (
        "import sys; from fastkv.eval.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "from fastkv.eval.cli_flags import PARSERS\n"
        "assert len([build() for build in PARSERS.values()]) == 7\n"
        "assert main(['--model', 'x', '--task', 'nope']) == 2\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "niah_multikey" in done.stdout
    assert "min_tokens=8" in done.stdout


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    for source in Path(MODEL).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert fingerprint(tmp_path) == fingerprint(Path(MODEL))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert fingerprint(tmp_path) != fingerprint(Path(MODEL))
