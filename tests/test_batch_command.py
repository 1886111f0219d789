"""fastkv-batch without Ray: its workers run in this process, one after another. test_batch_ray.py has real ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastkv import LLM, Policy
from fastkv.cache.catalogue import SETTINGS
from fastkv.cli import main as fastkv_run
from fastkv.console.batch import pipeline, worker
from fastkv.console.batch.answering import answered
from fastkv.console.batch.command import main
from fastkv.console.batch.flags import build_parser
from fastkv.console.batch.folder import OutputFolder, begin
from fastkv.console.batch.room import Room, Wanted
from fastkv.console.batch.shards import Shard
from fastkv.console.batch.worker import Done, Setup, Worker
from fastkv.console.load import load_by_flags
from fastkv.console.run_flags import SAMPLING_FLAGS
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError, FaultError

Run = Callable[..., tuple[int, str, str]]
Change = Callable[[Done], Done]
PROMPTS = [
    {"id": f"p{n}", "prompt": f"The access code of the old mill is {n}111. Its access code is"} for n in range(7)
]


class Pool:
    """In place of Ray's actors: one worker, told of each shard. change: what becomes of what it tells."""

    def __init__(self) -> None:
        self.check_ray = pipeline.check_ray  # the real one
        self.shards: list[int] = []
        self.setup: Setup | None = None
        self.change: Change = lambda done: done

    def run(
        self, setup_of: Callable[[Room], Setup], shards: Sequence[Shard], wanted: Wanted
    ) -> Generator[Done, None, None]:
        self.setup = setup_of(Room(2, 1, 0.0, "cpu"))
        worker = Worker(self.setup)
        for shard in shards:
            self.shards.append(shard.number)
            yield self.change(worker.done(shard))

    def asked(self) -> list[int]:
        """The shards since the last call."""
        asked, self.shards = self.shards, []
        return asked


_engines: dict[str, LLM] = {}


def loaded_once(args: argparse.Namespace, policy: Policy) -> LLM:
    """Of one model with one policy: to load it takes longer than what most tests ask of it."""
    key = f"{args.model} {args.kv_dtype} {policy}"
    if key not in _engines:
        _engines[key] = load_by_flags(args, policy)
    return _engines[key]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    pool = Pool()
    monkeypatch.setattr(pipeline, "run", pool.run)
    monkeypatch.setattr(pipeline, "check_ray", lambda: None)
    monkeypatch.setattr(worker, "load_by_flags", loaded_once)
    return pool


@pytest.fixture
def run(
    pool: Pool,
    archive_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """fastkv-batch on the bundled model, in a folder with seven prompts, three a shard: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    write(*PROMPTS)

    def call(*argv: str) -> tuple[int, str, str]:
        model = ["--model", str(archive_folder), "--device", "cpu", "--dtype", "float32", "--max-tokens", "2"]
        status = main([*model, "--prompts", "in.jsonl", "--output", "out", "--shard-size", "3", *argv])
        return status, *capsys.readouterr()

    return call


def write(*lines: dict[str, Any] | bytes) -> None:
    Path("in.jsonl").write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n"
    )


def records() -> list[dict[str, Any]]:
    files = sorted(Path("out").glob("shard-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def kept() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("out").iterdir())}


def test_records_are_those_of_fastkv_run(run: Run, pool: Pool, archive_folder: Path) -> None:
    """With the same flags, in the same order, and the number of the line besides."""
    flags = ["--kv-retention", "0.3", "--min-tokens", "8", "--stop", "zzz"]
    status, out, err = run(*flags)
    assert (status, out) == (0, "")
    assert err.startswith("7 answers to out: ")
    assert pool.asked() == [0, 1, 2]
    model = ["--model", str(archive_folder), "--device", "cpu", "--dtype", "float32", "--max-tokens", "2"]
    assert fastkv_run([*model, "--prompts", "in.jsonl", "--output", "one.jsonl", *flags]) == 0
    wanted = {r["id"]: r for r in map(json.loads, Path("one.jsonl").read_text().splitlines())}
    found = records()
    assert [record["id"] for record in found] == [prompt["id"] for prompt in PROMPTS]
    assert [record.pop("line") for record in found] == [1, 2, 3, 4, 5, 6, 7]
    for record in found:
        assert list(record) == list(wanted[record["id"]])
        assert {**record, "metrics": None} == {**wanted[record["id"]], "metrics": None}


def test_what_fails_is_a_record_and_not_the_end(run: Run) -> None:
    long = {"id": "long", "prompt": "code " * 9000}
    lines = [PROMPTS[0], b"{no json", {"id": "empty", "prompt": ""}, b"", long, b'{"prompt": "\xff"}', PROMPTS[1]]
    write(*lines, {"prompt": "a", "ID": 1}, {"id": 3, "prompt": "a\ud800"}, {"id": "p0", "prompt": "other"})
    status, _, err = run()
    assert status == 0
    assert err.startswith("2 answers to out: ")
    assert '; 7 prompts failed: see "error" in their records' in err
    errors = {record["line"]: (record["id"], record["error"]) for record in records() if "error" in record}
    assert [record["line"] for record in records()] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert errors.pop(5)[1].startswith("the prompt has 900")
    assert errors == {
        2: ("2", "line 2: is not JSON; write one object a line"),
        3: ("empty", "line 3: needs a text as prompt"),
        6: ("6", "line 6: is not UTF-8 (byte 12)"),
        8: ("8", "line 8: ID is neither prompt nor id"),
        9: ("3", "line 9: holds half of a surrogate pair, which is no text"),
        10: ("p0", "line 10: an earlier prompt has the id p0; give each its own"),
    }
    assert all(record["prompt_sha256"] for record in records() if record["line"] in (1, 5, 7))


def test_a_complaint_about_one_prompt_names_the_flag(run: Run) -> None:
    write(*PROMPTS[:2])
    assert run("--max-tokens", "8190")[0] == 0
    said = "--max-tokens: max_tokens must be at most 8"
    assert [record["error"][: len(said)] for record in records()] == [said, said]


def test_what_fails_at_work_takes_no_other_with_it() -> None:
    """The engine stops with its error; those that are done stay, and the others are asked one by one."""
    asked: list[list[str]] = []

    def generate_each(prompts: list[str], params: Any, **limits: Any) -> Iterator[tuple[int, str]]:
        asked.append(prompts)
        if "wrong" in prompts:
            raise FastKVError("prompt is wrong", prompt=prompts.index("wrong")) from FastKVError("is wrong")
        return answers(prompts)

    def answers(prompts: list[str]) -> Iterator[tuple[int, str]]:
        for place, prompt in enumerate(prompts):
            if prompt == "nan":
                raise FaultError("logits are NaN")
            yield place, prompt.upper()

    llm: Any = SimpleNamespace(generate_each=generate_each)
    found = answered(llm, ["a", "nan", "wrong", "b", "c"], SamplingParams(), {})
    assert [str(answer) for answer in found] == ["A", "logits are NaN", "is wrong", "B", "C"]
    assert asked == [["a", "nan", "wrong", "b", "c"], ["a", "nan", "b", "c"], ["nan"], ["b"], ["c"]]


def test_what_is_wrong_with_all_prompts_is_no_record(run: Run) -> None:
    status, _, err = run("--policy", "gemfilter", "--reuse-prefix")
    assert status == 2
    assert err.startswith("fastkv-batch: error: --reuse-prefix: ")
    assert not Path("out").exists()


def test_the_same_command_again_does_nothing(run: Run, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks neither for Ray nor for a model, and touches no file."""
    assert run()[0] == 0
    before = kept()

    def refuse(*_: Any) -> Any:
        raise AssertionError

    for module, name in ((pipeline, "run"), (pipeline, "check_ray"), (worker, "load_by_flags")):
        monkeypatch.setattr(module, name, refuse)
    assert run() == (0, "", "0 answers to out: 0 tokens in 0.0 s; 7 were there already\n")
    assert kept() == before


def test_only_what_is_missing_is_done(run: Run, pool: Pool) -> None:
    assert run()[0] == 0
    before = kept()
    Path("out/shard-000001.jsonl").unlink()
    pool.asked()
    status, _, err = run()
    assert status == 0
    assert pool.asked() == [1]
    assert err.startswith("3 answers to out: ")
    assert err.endswith("; 4 were there already\n")
    assert {name: kept()[name] == before[name] for name in before} == {name: "000001" not in name for name in before}
    assert [record["line"] for record in records()] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-tokens", "5"], "was made with sampling max tokens 2, not 5"),
        (["--kv-retention", "0.5"], "was made with policy kv retention 0.1, not 0.5"),
        (["--policy", "full"], 'was made with policy name "fastkv", not "full"'),
        (["--shard-size", "4"], "was made with shard size 3, not 4"),
        (["--stop", "x"], 'was made with sampling stop [], not ["x"]'),
        (["--dtype", "bfloat16"], 'was made with dtype "float32", not "bfloat16"'),
    ],
    ids=str,
)
def test_other_settings_are_refused(run: Run, pool: Pool, flags: list[str], said: str) -> None:
    assert run()[0] == 0
    Path("out/shard-000002.jsonl").unlink()
    before = kept()
    pool.asked()
    status, _, err = run(*flags)
    assert status == 2
    assert err == f"fastkv-batch: error: --output: {Path('out').absolute()}: {said}; name another folder\n"
    assert (kept(), pool.asked()) == (before, [])


def test_other_prompts_and_another_model_are_refused(run: Run, make_copy: Callable[[], str]) -> None:
    assert run()[0] == 0
    write(*PROMPTS[:6], {"id": "p6", "prompt": "another"})
    assert "out: was made with prompts " in run()[2]
    write(*PROMPTS)
    assert "out: was made with model " in run("--model", make_copy())[2]


@pytest.fixture
def make_copy(archive_folder: Path, tmp_path: Path) -> Callable[[], str]:
    def make() -> str:
        (tmp_path / "model").mkdir()
        for source in archive_folder.iterdir():
            (tmp_path / "model" / source.name).symlink_to(source)
        return str(tmp_path / "model")

    return make


def test_a_model_that_changed_under_its_name_is_refused(run: Run, make_copy: Callable[[], str]) -> None:
    model = make_copy()
    assert run("--model", model)[0] == 0
    config = Path(model, "generation_config.json")
    config.unlink(missing_ok=True)
    config.write_text('{"eos_token_id": 1}')
    assert "out: was made with model files " in run("--model", model)[2]


# Of all flags, those that change no answer, but how it is made or told, and what the manifest calls the others.
_HOW = {
    *("output", "workers", "address", "gpus_per_worker", "batch_size", "kv_memory"),
    *("device", "threads", "no_cuda_graph", "compile", "offload", "attention"),
    *("quiet", "version", "help", "policy_file"),
}
_RECORDED = {
    **{name: name for name in ("model", "prompts", "shard_size", "revision", "dtype", "weights", "kv_dtype")},
    **{name: name for name in ("decode_budget", "reuse_prefix", "chat", "system", "chat_arg", "policy")},
    **dict.fromkeys(("stop", "stop_token", "ignore_eos"), "sampling"),
    "share_layers": "shared_layers",
}


def test_the_manifest_says_everything_that_an_answer_depends_on(run: Run) -> None:
    """A flag that is new is one of these, or a folder would be continued with other answers."""
    flags = {action.dest for action in build_parser()._actions} - {*SETTINGS, *SAMPLING_FLAGS}
    assert flags == _HOW | set(_RECORDED)
    assert run()[0] == 0
    manifest = json.loads(Path("out/batch.json").read_bytes())
    assert set(_RECORDED.values()) <= set(manifest)
    assert set(SAMPLING_FLAGS) <= set(manifest["sampling"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.txt", "mine", "out: is not empty, and none of this command's; name another folder"),
        ("batch.json", '{"a": 1}\n', "batch.json, line 1: is no record of such a run; name another file"),
        ("batch.json", "only copy", "batch.json, line 1: is no record of such a run; name another file"),
    ],
)
def test_a_folder_of_something_else_stays_as_it_is(run: Run, pool: Pool, name: str, content: str, said: str) -> None:
    Path("out").mkdir()
    Path("out", name).write_text(content)
    status, _, err = run()
    assert (status, err.endswith(f"{said}\n"), pool.asked()) == (2, True, [])
    assert kept() == {name: content.encode()}


def test_what_a_killed_run_left_is_taken_up(run: Run) -> None:
    """The beginning of a manifest, what a worker was writing, and which shards had been begun."""
    Path("out/.begun").mkdir(parents=True)
    Path("out/.begun/shard-000000.jsonl").write_text("host 1\n" * 9)
    Path("out/.fastkv-0.tmp").write_text("{")
    Path("out/batch.json").write_text('{"kind": "fastkv-ba')
    status, _, err = run()
    assert (status, "died" in err) == (0, False)
    assert set(kept()) == {"batch.json", *(f"shard-00000{n}.jsonl" for n in range(3))}


def test_two_commands_do_not_write_to_one_folder(run: Run) -> None:
    assert run()[0] == 0
    content = json.loads(Path("out/batch.json").read_bytes())
    del content["kind"]
    with OutputFolder(Path("out").absolute(), content):
        status, _, err = run()
    assert (status, len(err.splitlines())) == (2, 1)
    assert "batch.json: " in err
    assert " is writing to it; " in err


def test_ctrl_c_leaves_what_is_done(run: Run, pool: Pool) -> None:
    def interrupt(done: Done) -> Done:
        if done.shard == 1:
            raise KeyboardInterrupt
        return done

    pool.change = interrupt
    told = "stopped; the same command continues after the shards that are in out\n"
    assert run() == (130, "", told)
    assert pool.asked() == [0, 1]
    pool.change = lambda done: done
    assert run()[0] == 0
    assert pool.asked() == [2]


def test_a_shard_that_is_lost_is_told_and_done_the_next_time(run: Run, pool: Pool) -> None:
    def lose(done: Done) -> Done:
        if done.shard == 1:
            Path("out/shard-000001.jsonl").unlink()
            return Done(1, lost="4 workers died while they were at it")
        return done

    pool.change = lose
    status, out, err = run()
    assert (status, out) == (1, "")
    where = "shard-000001.jsonl (line 4 of the prompts and what follows): 4 workers died while they were at it"
    assert err.splitlines() == [
        f"fastkv-batch: warning: {where}",
        f"fastkv-batch: error: 1 shard could not be done: {where}; the rest is there, and the same command tries again",
    ]
    pool.change = lambda done: done
    assert run()[0] == 0
    assert len(records()) == 7


def test_many_lost_shards_end_the_work(run: Run, pool: Pool) -> None:
    pool.change = lambda done: Done(done.shard, lost="RuntimeError: no")
    status, _, err = run("--shard-size", "1")
    assert (status, pool.asked()) == (1, [0, 1, 2, 3])
    assert err.splitlines()[-1].startswith(
        "fastkv-batch: error: 4 shards could not be done, the last one shard-000003."
    )


def test_a_shard_that_does_not_come_is_told(run: Run, pool: Pool) -> None:
    """Whatever a worker says, the files count."""

    def forget(done: Done) -> Done:
        Path("out/shard-000002.jsonl").unlink(missing_ok=True)
        return done

    pool.change = forget
    status, _, err = run()
    assert status == 1
    assert err.startswith("fastkv-batch: error: 1 shard did not come: shard-000002.jsonl ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv-dtype", "int9"], "--kv-dtype: kv_dtype must be one of int8, int4, not 'int9'"),
        (["--stop-token", "no such"], "--stop-token: 'no such' is no token of this model; "),
        (["--tsp-layer", "99"], "--tsp-layer: "),
    ],
    ids=str,
)
def test_what_is_wrong_with_the_engine_is_one_line(run: Run, flags: list[str], said: str) -> None:
    """A worker finds it, the command says it, and nothing stays that would bar the folder to the next try."""
    status, out, err = run(*flags)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"fastkv-batch: error: {said}")
    assert not Path("out").exists()
    assert run()[0] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "no/such/model"], "no/such/model: no such folder; "),
        (["--prompts", "nowhere"], "--prompts: nowhere: cannot be read "),
        (["--output", "in.jsonl"], "--output: "),
        (["--output", "-"], "--output takes a name, not '-'"),
        (["--workers", "0"], "--workers: "),
        (["--shard-size", "0"], "--shard-size: "),
        (["--batch-size", "0"], "--batch-size: "),
        (["--kv-memory", "0"], "--kv-memory: "),
        (["--threads", "0"], "--threads: "),
        (["--gpus-per-worker", "2"], "--gpus-per-worker: "),
        (["--gpus-per-worker", "1"], "--gpus-per-worker: is for GPUs: leave it out, or --device cpu"),
        (["--device", "cuda:1"], "--device: Ray says which GPU a worker gets"),
        (["--address", "ray://a:1"], "--address: is auto, or HOST:PORT of the cluster's head, not 'ray://a:1'"),
        (["--address", "a:x"], "--address: "),
        (["--system", "s"], "--system is for --chat"),
        (["--policy", "full", "--policy-file", "f"], "--policy-file names a policy already"),
        (["--decode-budget", "1"], "--decode-budget: "),
        (["--temperature", "-1"], "--temperature: "),
        (["--share-layers", "nowhere"], "--share-layers: nowhere: "),
        (["--stop", "\udcff"], "--stop: is not UTF-8"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_the_work_begins(run: Run, pool: Pool, flags: list[str], said: str) -> None:
    status, out, err = run(*flags)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"fastkv-batch: error: {said}")
    assert (pool.asked(), Path("out").exists()) == ([], False)


def test_without_ray_one_line_says_what_to_install(run: Run, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "check_ray", pool.check_ray)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run() == (2, "", 'fastkv-batch: error: fastkv-batch needs ray: pip install "fastkv[ray]"\n')
    assert not Path("out").exists()


# --- a worker ---------------------------------------------------------------------------------------------------------


def test_a_worker_does_not_do_again_what_one_that_died_had_written(run: Run, pool: Pool) -> None:
    """It dies after its file is there, and before it tells: another one is given the shard."""
    told: list[Done] = []

    def again(done: Done) -> Done:
        assert pool.setup is not None
        before = Path("out", f"shard-{done.shard:06d}.jsonl").read_bytes()
        shard = Shard(done.shard, 1, 0, 0, 3, "of no bytes")  # it cannot even read its lines
        told.append(Worker(pool.setup).done(shard))
        assert Path("out", f"shard-{done.shard:06d}.jsonl").read_bytes() == before
        assert replace(told[-1], warnings=[]) == replace(done, warnings=[])
        return told[-1]

    pool.change = again
    status, _, err = run()
    assert (status, err.startswith("7 answers to out: ")) == (0, True)


def test_a_shard_that_workers_die_of_is_given_up(run: Run, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them notes that it begins; one that dies tells nothing more. What others had begun, one line says."""
    real = worker.begin

    def after_others(folder: Path, shard: Shard, name: str) -> int:
        for n in range({0: 1, 1: 4}.get(shard.number, 0)):
            begin(folder, shard, f"gone {n}")
        return real(folder, shard, name)

    monkeypatch.setattr(worker, "begin", after_others)
    status, _, err = run()
    assert status == 1
    assert "shard-000001.jsonl (line 4 of the prompts and what follows): 4 workers died while they were at it" in err
    assert {"shard-000000.jsonl", "shard-000001.jsonl"} & set(kept()) == {"shard-000000.jsonl"}
    monkeypatch.setattr(worker, "begin", lambda *x: (begin(x[0], x[1], "gone"), real(*x))[1])
    assert "; 1 worker died, and its work was done again; 4 were there already" in run()[2]


def test_a_worker_elsewhere_must_see_the_same_files(run: Run, pool: Pool, tmp_path: Path) -> None:
    assert run()[0] == 0
    setup = pool.setup
    assert setup is not None
    shard = Shard(9, 1, 0, 10, 1, "0" * 16)

    def told(**changes: Any) -> str:
        return str(Worker(replace(setup, **changes)).done(shard).fatal)

    (tmp_path / "other").mkdir()
    Path("out/.begun").mkdir()
    assert "other: is not the same folder on " in told(folder=str(tmp_path / "other"))
    assert "in.jsonl: has changed since the command began" in told()
    assert "nowhere: cannot be read by a worker (No such file or directory)" in told(prompts=str(tmp_path / "nowhere"))
    assert ": is another model on " in told(model_files="0")


def test_an_error_of_the_program_loses_one_shard(run: Run, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = worker.answer_lines

    def broken(llm: Any, lines: Any, *others: Any) -> Any:
        if lines[0].number == 4:
            raise IndexError("list index")
        return real(llm, lines, *others)

    monkeypatch.setattr(worker, "answer_lines", broken)
    status, _, err = run()
    assert (status, len(records())) == (1, 4)
    assert "IndexError: 'list index'" in err


def test_warnings_of_workers_are_said_once(run: Run, pool: Pool) -> None:
    pool.change = lambda done: replace(done, warnings=["fastkv-batch: warning: slow", f"of {done.shard}"])
    assert run()[2].splitlines()[:4] == ["fastkv-batch: warning: slow", "of 0", "of 1", "of 2"]


def test_dtypes_that_differ_are_told(run: Run, pool: Pool) -> None:
    pool.change = lambda done: replace(done, dtype="bfloat16" if done.shard else "float32")
    assert run()[2].endswith("; computed in bfloat16 and in float32: --dtype would make it one\n")
