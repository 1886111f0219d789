"""Several prompts from files, answers into a file, and a run that continues where it was stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FastKV, FullKV, SamplingParams, SnapKV
from fastkv.cache.catalogue import SETTINGS
from fastkv.cli import main
from fastkv.cli_flags import build_parser
from fastkv.console.run_flags import SAMPLING_FLAGS

Run = Callable[..., tuple[int, str, str]]
TEXTS = {
    "one.txt": "The access code of the old mill is 1111. The access code of the old mill is",
    "two.txt": "A quiet neighbor found a small boat. " * 20,
    "three.txt": "The access code of the red door is 2222.",
}


@pytest.fixture
def run(
    archive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """fastkv-run on the bundled model, in a folder with three prompts: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        Path(name).write_text(text + "\n")
    lines = [{"id": name, "prompt": text} for name, text in TEXTS.items()]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")

    def call(*argv: str) -> tuple[int, str, str]:
        model = ["--model", str(archive_folder), "--device", "cpu", "--dtype", "float32"]
        status = main([*model, "--max-tokens", "6", *argv])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def files() -> list[str]:
    return [word for name in TEXTS for word in ("--prompt", name)]


def records(name: str = "out.jsonl") -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert len({record["id"] for record in found}) == len(found)
    return {record["id"]: record for record in found}


@pytest.mark.parametrize("argv", [files(), ["--prompts", "prompts.jsonl"]], ids=["files", "jsonl"])
def test_each_prompt_has_its_record(run: Run, archive_llm: LLM, argv: list[str]) -> None:
    status, out, err = run(*argv, "--output", "out.jsonl", "--kv-retention", "0.3", "--min-tokens", "8")
    assert (status, out) == (0, "")
    assert err.startswith("3 answers to out.jsonl: ")
    policy = FastKV(kv_retention=0.3, min_tokens=8)
    for name, text in TEXTS.items():
        record = records()[name]
        expected = archive_llm.generate(text, SamplingParams(max_tokens=6), policy)
        assert record["text"] == expected.text
        assert record["token_ids"] == expected.token_ids
        assert record["finish_reason"] == expected.finish_reason
        assert record["metrics"]["kv_tokens"] == expected.metrics.kv_tokens
        assert record["policy"]["kv_retention"] == 0.3
        assert record["sampling"]["max_tokens"] == 6


@pytest.mark.parametrize("flags", [["--policy", "full"], ["--policy", "snapkv", "--kv-len", "24", "--reuse-prefix"]])
def test_prompts_that_begin_alike_are_read_once(run: Run, archive_llm: LLM, flags: list[str]) -> None:
    start = "A quiet neighbor found a small boat. " * 10
    asked = {"a.txt": start + "The access code is", "b.txt": start + "A calm owl keeps"}
    for name, text in asked.items():
        Path(name).write_text(text)
    status, _, err = run("--prompt", "a.txt", "--prompt", "b.txt", "--output", "out.jsonl", *flags)
    assert status == 0
    first, second = (record["metrics"]["reused_tokens"] for record in records().values())
    assert (first, second > 64) == (0, True)
    assert f"; {second} tokens of prompts that begin alike were read once" in err
    policy = FullKV() if "full" in flags else SnapKV(kv_len=24)
    outputs = archive_llm.generate(list(asked.values()), SamplingParams(max_tokens=6), policy, reuse_prefix=True)
    assert [record["token_ids"] for record in records().values()] == [each.token_ids for each in outputs]


def test_lines_without_an_id_are_numbered(run: Run) -> None:
    Path("p.jsonl").write_text('\ufeff{"prompt": "a b"}\n\n{"prompt": "c d"}')
    assert run("--prompts", "p.jsonl", "--output", "out.jsonl")[0] == 0
    assert set(records()) == {"1", "3"}


def test_a_stopped_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has an answer is not asked again; a record that was cut short is."""
    assert run(*files(), "--output", "whole.jsonl")[0] == 0
    whole = records("whole.jsonl")
    lines = Path("whole.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text(lines[0] + lines[1][:40])
    asked: list[int] = []
    real = LLM.generate_each

    def count(self: LLM, prompts: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(len(prompts))
        return real(self, prompts, *arguments, **named)

    monkeypatch.setattr(LLM, "generate_each", count)
    status, _, err = run(*files(), "--output", "out.jsonl")
    assert status == 0
    assert "2 answers" in err
    assert "1 was there already" in err
    assert asked == [2]
    assert {name: r["token_ids"] for name, r in records().items()} == {n: r["token_ids"] for n, r in whole.items()}
    before = Path("out.jsonl").read_bytes()
    assert run(*files(), "--output", "out.jsonl", "--quiet") == (0, "", "")
    assert Path("out.jsonl").read_bytes() == before


def test_ctrl_c_keeps_what_is_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkv.console.job import Records

    append = Records.append

    def interrupted(self: Records, *arguments: Any) -> None:
        append(self, *arguments)
        if len(self.done) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Records, "append", interrupted)
    status, out, err = run(*files(), "--output", "out.jsonl")
    assert (status, out) == (130, "")
    assert err == "stopped; the same command continues after the answers that are in out.jsonl\n"
    assert len(records()) == 2


def test_chat_prompts_of_several(run: Run, archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversations: list[Any] = []

    def chat(self: LLM, messages: Any) -> list[int]:
        conversations.append(messages)
        return [5, 6, 7]

    monkeypatch.setattr(LLM, "chat", chat)
    assert run(*files(), "--output", "out.jsonl", "--chat", "--system", "Be brief.")[0] == 0
    assert conversations == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in TEXTS.values()
    ]
    assert {record["system"] for record in records().values()} == {"Be brief."}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "required: --prompt or --prompts"),
        (["--prompt", "one.txt", "--prompts", "prompts.jsonl"], "one of the two"),
        (["--prompts", "prompts.jsonl"], "several prompts need --output FILE"),
        (files(), "several prompts need --output FILE"),
        (["--prompt", "one.txt", "--prompt", "one.txt", "--output", "o"], "two prompts of the name one.txt"),
        (["--prompt", "one.txt", "--batch-size", "2"], "--batch-size is for several prompts"),
        (["--prompt", "one.txt", "--kv-memory", "2"], "--kv-memory is for several prompts"),
        (["--prompt", "one.txt", "--reuse-prefix"], "--reuse-prefix is for several prompts"),
        (
            [*files(), "--output", "o", "--reuse-prefix", "--policy", "gemfilter"],
            "--reuse-prefix: reuse_prefix does not",
        ),
        (["--prompt", "one.txt", "--output", "o", "--json"], "--json is for one prompt"),
        (["--prompt", "one.txt", "--output", "o", "--report", "r.html"], "--report is for one prompt"),
        (["--prompt", "one.txt", "--output", "no/such/o"], "--output: no/such/o: cannot be written"),
        (["--prompt", "one.txt", "--output", "."], "--output: .: cannot be written"),
        ([*files(), "--output", "o", "--batch-size", "0"], "--batch-size:"),
        ([*files(), "--output", "o", "--kv-memory", "0"], "--kv-memory:"),
        (["--prompts", ""], "--prompts takes the name of a file, not ''"),
        (["--prompts", "-", "--output", "o"], "--prompts takes the name of a file, not '-'"),
        (["--prompt", "one.txt", "--output", "-"], "--output takes the name of a file, not '-'"),
        (["--prompt", "one.txt", "--output", "/dev/null"], "--output: /dev/null: cannot be written, for it is no ordi"),
        (["--prompt", "one.txt", "--report", "./one.txt"], "--report: ./one.txt: is the prompt, which it would overwr"),
        (["--prompts", "missing.jsonl", "--output", "o"], "--prompts: missing.jsonl: cannot be read"),
        (["--prompts", "one.txt", "--output", "o"], "--prompts: one.txt, line 1: is not JSON"),
    ],
    ids=str,
)
def test_mistakes(run: Run, argv: list[str], named: str) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("fastkv-run: error: ")
    assert len(err.splitlines()) == 1
    assert named in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("\n\n", "has no lines; write one object with prompt"),
        ('{"prompt": "a"}\n["b"]\n', "line 2: is no object with prompt"),
        ('{"prompt": ""}\n', "line 1: needs a text as prompt"),
        ('{"prompt": 7}\n', "line 1: needs a text as prompt"),
        ('{"prompt": "a", "id": null}\n', "line 1: id must be a text or a whole number, not null"),
        ('{"prompt": "a", "id": [1]}\n', "line 1: id must be a text or a whole number, not [1]"),
        ('{"prompt": "a", "id": true}\n', "line 1: id must be a text or a whole number, not true"),
        ('{"prompt": "a\\ud800"}\n', "line 1: holds half of a surrogate pair"),
        ('{"prompt": "a", "id": "\\udfff"}\n', "line 1: holds half of a surrogate pair"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"prompt": "a", "max_tokens": 3}\n', "line 1: max_tokens is neither prompt nor id"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}\n', "two prompts of the name 2"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_lists_of_prompts(run: Run, text: str | bytes, named: str) -> None:
    Path("p.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    status, _, err = run("--prompts", "p.jsonl", "--output", "o")
    assert status == 2
    assert err.startswith("fastkv-run: error: --prompts: ")
    assert named in err
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--max-tokens", "7"], "sampling max_tokens 6, not 7"),
        (["--kv-retention", "0.2"], "policy kv_retention 0.1, not 0.2"),
        (["--policy", "full"], 'policy name "fastkv", not "full"'),
        (["--decode-budget", "64"], "decode_budget null, not 64"),
        (["--dtype", "bfloat16"], 'dtype "float32", not "bfloat16"'),
        (["--kv-dtype", "int8"], 'kv_dtype null, not "int8"'),
        (["--weights", "int8"], 'dtype "float32", not "float32, int8 weights"'),
        (["--reuse-prefix"], "reuse_prefix null, not true"),
        (["--stop", "x"], 'sampling stop [], not ["x"]'),
        (["--ignore-eos"], "sampling ignore_eos false, not true"),
    ],
    ids=str,
)
def test_the_output_of_another_run_is_refused(run: Run, change: list[str], named: str) -> None:
    assert run(*files(), "--output", "out.jsonl")[0] == 0
    before = Path("out.jsonl").read_bytes()
    status, _, err = run(*files(), "--output", "out.jsonl", *change)
    assert status == 2
    assert f"--output: out.jsonl, line 1: was made with {named}; name another file" in err
    assert Path("out.jsonl").read_bytes() == before


def test_another_revision_is_another_model(run: Run, archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*files(), "--output", "out.jsonl")[0] == 0
    monkeypatch.setattr("fastkv.cli.load_by_flags", lambda args, policy: archive_llm)
    status, _, err = run(*files(), "--output", "out.jsonl", "--revision", "other")
    assert (status, 'was made with revision null, not "other"' in err) == (2, True)


# Of all flags, those that change no answer, but how it is made or told. What they change is rounding.
_HOW = {
    *("prompt", "prompts", "policy_file", "save_cache", "output", "batch_size", "kv_memory", "report", "json"),
    *("device", "threads", "no_cuda_graph", "compile", "attention", "offload", "quiet", "verbose", "version", "help"),
}
_REFUSED_WITH_OUTPUT = {"lossless", "speculation", "draft_tokens", "draft_weights"}
# By the name that records have for it. The other flags are settings of the policy, and of sampling.
_RECORDED = {
    "model": "model",
    "revision": "revision",
    "dtype": "dtype",
    "weights": "dtype",
    "kv_dtype": "kv_dtype",
    "share_layers": "shared_layers",
    "decode_budget": "decode_budget",
    "reuse_prefix": "reuse_prefix",
    "chat": "chat",
    "system": "system",
    "chat_arg": "chat_arg",
    "context": "context_sha256",
    "cache": "context_sha256",
    "policy": "policy",
    "stop": "sampling",
    "stop_token": "sampling",
    "ignore_eos": "sampling",
}


def test_a_record_says_everything_that_an_answer_depends_on(run: Run) -> None:
    """A flag that is new is one of these, or answers of another one would be taken for those of a run that goes on."""
    flags = {action.dest for action in build_parser()._actions} - {*SETTINGS, *SAMPLING_FLAGS}
    assert flags == _HOW | _REFUSED_WITH_OUTPUT | set(_RECORDED)
    assert run(*files(), "--output", "out.jsonl")[0] == 0
    (record, *_) = records().values()
    assert set(_RECORDED.values()) <= set(record)


@pytest.mark.parametrize(
    "text",
    [
        "My only copy of a note",
        '{"prompt": "a"}',
        '{"id": "one.txt", "prompt": "a"}',
        '{"id": ["one.txt"], "prompt_sha256": "0"}\n',
        "[" * 100_000,
        b"\x00\xff",
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_record_stays_as_it_is(run: Run, text: str | bytes) -> None:
    """Only the beginning of a record is cut off: a file named by mistake may be the only copy."""
    Path("out.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = Path("out.jsonl").read_bytes()
    status, _, err = run(*files(), "--output", "out.jsonl")
    assert status == 2
    assert err == "fastkv-run: error: --output: out.jsonl, line 1: is no record of such a run; name another file\n"
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("end", [3, 12, None])
def test_a_last_record_without_its_end_is_asked_again(run: Run, end: int | None) -> None:
    assert run(*files(), "--output", "out.jsonl")[0] == 0
    last = Path("out.jsonl").read_text().splitlines()[-1]
    Path("out.jsonl").write_text(last[:end])
    assert run(*files(), "--output", "out.jsonl")[0] == 0
    assert set(records()) == set(TEXTS)


def test_a_complaint_names_the_prompt(run: Run) -> None:
    """By its id, which its place among those that are still to be asked is not."""
    assert run("--prompt", "three.txt", "--output", "out.jsonl")[0] == 0
    prompts = {"three.txt": TEXTS["three.txt"], "short": "code " * 10, "long": "code " * 9000}
    lines = [{"id": name, "prompt": text} for name, text in prompts.items()]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, _, err = run("--prompts", "p.jsonl", "--output", "out.jsonl")
    assert status == 2
    assert err.startswith("fastkv-run: error: prompt long: the prompt has ")
    status, _, err = run("--prompts", "p.jsonl", "--output", "b.jsonl", "--max-tokens", "8190")
    assert status == 2
    assert err.startswith("fastkv-run: error: --max-tokens: prompt three.txt: max_tokens must be at most ")


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--kv-memory", "0"], ["--output", "no/such/o"]], ids=str)
def test_mistakes_in_flags_are_told_before_the_model_is_looked_for(run: Run, flags: list[str]) -> None:
    status, _, err = run(*files(), "--output", "o", *flags, "--model", "no/such/model")
    assert status == 2
    assert err.startswith(f"fastkv-run: error: {flags[0]}: ")


def test_a_long_setting_is_not_spelt_out(run: Run) -> None:
    for name, score in (("a.json", 1), ("b.json", 2)):
        Path(name).write_text(json.dumps({"scores": [[score / 3, 0.123456789]] * 8}))
    headkv = ["--policy", "headkv", "--output", "out.jsonl", "--head-scores"]
    assert run(*files(), *headkv, "a.json")[0] == 0
    status, _, err = run(*files(), *headkv, "b.json")
    assert status == 2
    assert err.startswith("fastkv-run: error: --output: out.jsonl, line 1: was made with policy head_scores [[0.333")
    assert ", not [[0.666" in err
    assert err.endswith("…; name another file\n")
    assert len(err) < 300


def test_the_output_for_another_text_is_refused(run: Run) -> None:
    assert run(*files(), "--output", "out.jsonl")[0] == 0
    Path("two.txt").write_text("Something else.")
    status, _, err = run(*files(), "--output", "out.jsonl")
    assert status == 2
    assert "prompt two.txt was another text" in err
    Path("out.jsonl").write_text("Dear diary\n")
    assert "line 1: is no record of such a run" in run(*files(), "--output", "out.jsonl")[2]


def test_two_runs_at_once_write_once(run: Run, archive_folder: Path) -> None:
    """The second one says in one line who has the file, before it loads the model; the first loses nothing."""
    waits = """
import sys
from fastkv.cli import main
from fastkv.console.job import Records
append = Records.append
def slow(self, *arguments):
    append(self, *arguments)
    if len(self.done) == 1:
        print("one is there", flush=True)
        sys.stdin.read()
Records.append = slow
sys.exit(main(sys.argv[1:]))
"""
    command = ["--model", str(archive_folder), "--device", "cpu", "--dtype", "float32", "--max-tokens", "6", *files()]
    with subprocess.Popen(
        [sys.executable, "-c", waits, *command, "--output", "out.jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "one is there\n"
        before = Path("out.jsonl").read_bytes()
        status, out, err = run(*files(), "--output", "out.jsonl", "--model", "no/such/model")
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith("fastkv-run: error: --output: out.jsonl: ")
        assert err.endswith(" is writing to it; wait until it has ended, or name another file\n")
        assert Path("out.jsonl").read_bytes() == before
        first.communicate()
    assert first.returncode == 0
    assert set(records()) == set(TEXTS)
    assert "3 were there already" in run(*files(), "--output", "out.jsonl")[2]
