"""The run of fastkv-eval: the same texts for every policy, in turn; stopped anywhere, it continues; a file is a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FastKVError, Metrics, Output, RunInfo, SamplingParams
from fastkv.cache.policy import Policy
from fastkv.eval.cli import main
from fastkv.eval.example import Example, Slot
from fastkv.eval.policy_spec import parse_policies
from fastkv.eval.results import Results
from fastkv.eval.runner import Plan, Question, Runner
from fastkv.eval.tasks import GENERATED

LABELS = ["full", "fastkv:kv_retention=0.05,tsp_rate=1"]
PLAN = Plan((GENERATED["archive"], GENERATED["niah_multikey"]), (260, 400), (0.0, 1.0), examples=2)
N_EXAMPLES = 2 * (2 * 2 + 2)  # indices x (lengths x depths of archive + lengths of niah_multikey)
HEADER = {"seed": 0, "policies": LABELS, "lengths": (260, 400)}


def checksum(ids: list[int]) -> str:
    return Question(Slot("", None, None, 0), Example("", ()), ids).checksum


class Scripted:
    """Stands in for the model: remembers what it was asked, answers nonsense, and can be stopped."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Policy, int]] = []
        self.stop_after: int | None = None

    def generate(self, ids: list[int], params: SamplingParams, policy: Policy) -> Output:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        assert params.max_tokens is not None
        self.asked.append((ids, policy, params.max_tokens))
        metrics = Metrics(len(ids), 2, 0.1, 50.0, 10, 40, 400, 1000, 9000, 10, (), None)
        return Output(f" {len(self.asked)}", [1, 2], "length", metrics, RunInfo(policy.name, {}, "cpu", "float32"))


@pytest.fixture
def scripted(archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted()
    monkeypatch.setattr(archive_llm, "generate", script.generate)
    return script


@pytest.fixture
def runner(archive_llm: LLM) -> Runner:
    return Runner(archive_llm, PLAN, parse_policies(LABELS, archive_llm.config.n_layers))


def test_every_policy_reads_the_same_ids_in_turn(runner: Runner, scripted: Scripted) -> None:
    results = Results(HEADER)
    reports: list[tuple[int, int]] = []
    runner.run(results, lambda record, done, total: reports.append((done, total)))
    assert len(scripted.asked) == 2 * N_EXAMPLES == len(results.records)
    assert reports == [(i + 1, 2 * N_EXAMPLES) for i in range(2 * N_EXAMPLES)]
    for i in range(0, len(scripted.asked), 2):
        (ids, first, tokens), (others, second, _) = scripted.asked[i : i + 2]
        assert ids == others
        in_turn = slice(None) if i % 4 == 0 else slice(None, None, -1)  # the one goes first, then the other
        assert [first.name, second.name] == ["full", "fastkv"][in_turn]
        assert tokens == GENERATED[results.records[i].task].max_new_tokens
        assert [record.policy for record in results.records[i : i + 2]] == LABELS[in_turn]
        assert {record.prompt_sha256 for record in results.records[i : i + 2]} == {checksum(ids)}
        assert results.records[i].prompt_tokens == len(ids) <= results.records[i].length
    assert len({record.id for record in results.records}) == N_EXAMPLES
    # Balanced: the first half of a run has every task, length and depth.
    half = results.records[:N_EXAMPLES]
    assert len({(record.task, record.length, record.depth) for record in half}) == N_EXAMPLES / 2


def test_scores_are_of_the_record_s_own_prediction(runner: Runner, archive_llm: LLM, monkeypatch: Any) -> None:
    """A model that says every right answer gets 1, and one that says none 0."""
    answers = {question.checksum: question.example for question in map(runner.question, PLAN.slots())}
    script = Scripted()

    def generate(ids: list[int], params: SamplingParams, policy: Policy) -> Output:
        prediction = " ".join(answers[checksum(ids)].answers) if policy.name == "full" else "no idea"
        return replace(script.generate(ids, params, policy), text=f" {prediction}.\n")

    monkeypatch.setattr(archive_llm, "generate", generate)
    results = Results(HEADER)
    runner.run(results)
    assert {(record.policy, record.score) for record in results.records} == {(LABELS[0], 1.0), (LABELS[1], 0.0)}


def stopped(runner: Runner, scripted: Scripted, path: Path, after: int) -> Results:
    """A run that was interrupted after so many answers; the next one will not be."""
    scripted.stop_after = after
    results = Results(HEADER, path)
    with pytest.raises(KeyboardInterrupt):
        runner.run(results)
    results.close()
    scripted.stop_after = None
    return results


@pytest.mark.parametrize("stop_after", [0, 1, 7, 2 * N_EXAMPLES - 1])
def test_a_stopped_run_continues(runner: Runner, scripted: Scripted, tmp_path: Path, stop_after: int) -> None:
    """Nothing is asked twice, nothing is left out, and the order is that of an unbroken run."""
    path = tmp_path / "run.jsonl"
    results = stopped(runner, scripted, path, stop_after)
    assert len(path.read_text().splitlines()) == 1 + stop_after
    again = Results(HEADER, path)
    assert (again.resumed, again.torn, again.records) == (stop_after, False, results.records)
    runner.run(again)
    again.close()
    assert len(scripted.asked) == 2 * N_EXAMPLES
    whole = Results(HEADER)
    runner.run(whole)
    assert [(r.id, r.policy, r.prompt_sha256) for r in again.records] == [
        (r.id, r.policy, r.prompt_sha256) for r in whole.records
    ]
    complete = Results(HEADER, path)
    assert complete.records == again.records
    asked = len(scripted.asked)
    runner.run(complete)
    complete.close()
    assert len(scripted.asked) == asked


def test_a_record_is_in_the_file_at_once(runner: Runner, scripted: Scripted, tmp_path: Path) -> None:
    """A run that is killed loses nothing: not one record waits in memory."""
    path = tmp_path / "run.jsonl"
    results = Results(HEADER, path)
    runner.run(results, lambda record, done, total: check_lines(path, done))
    results.close()


def check_lines(path: Path, done: int) -> None:
    assert len(path.read_bytes().splitlines()) == 1 + done


@pytest.mark.parametrize("torn", [b'{"id": "archive/tok', b"\xff\xfe", b"{" * 100_000], ids=["short", "binary", "long"])
def test_a_torn_last_line_is_dropped(runner: Runner, scripted: Scripted, tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "run.jsonl"
    stopped(runner, scripted, path, 5)
    path.write_bytes(path.read_bytes() + torn)
    again = Results(HEADER, path)
    assert (again.resumed, again.torn) == (5, True)
    runner.run(again)
    again.close()
    whole = Results(HEADER, path)
    assert (len(whole.records), whole.torn) == (2 * N_EXAMPLES, False)


def test_another_run_is_refused(tmp_path: Path) -> None:
    """What differs is named; when a run began does not count."""
    path = tmp_path / "run.jsonl"
    Results({**HEADER, "date": "2026-01-01"}, path).close()
    before = path.read_bytes()
    again = Results({**HEADER, "date": "2026-12-31"}, path)
    again.close()
    assert again.header["date"] == "2026-01-01"
    with pytest.raises(FastKVError, match=r"run\.jsonl: is another run's, with seed 0, not 1; name another file"):
        Results({**HEADER, "seed": 1}, path)
    with pytest.raises(FastKVError, match=r"lengths \[260, 400\], not null"):
        Results({"seed": 0, "policies": LABELS}, path)
    with pytest.raises(FastKVError, match="chat null, not true"):
        Results({**HEADER, "chat": True}, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"hello\n", b"{}\n", b"[1]\n", b"no line end", b'{"format": "fastkv-eval 1"}\n{"id": 3}\n', b"\xff\n"]
)
def test_a_file_that_is_no_result_file(tmp_path: Path, content: bytes) -> None:
    """It is named, and stays as it is."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(FastKVError, match=r"notes\.txt.*name another file") as refused:
        Results({}, path)
    assert refused.value.setting == "output"
    assert path.read_bytes() == content


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    """`--output /dev/null`, run by root, once made a file of the device."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FastKVError, match="pipe: cannot be written, for it is no ordinary file"):
        Results(HEADER, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_of_long_values_the_part_that_differs_is_shown(tmp_path: Path) -> None:
    policies = [{"label": f"fastkv:window={window}"} for window in range(20, 40)]
    path = tmp_path / "run.jsonl"
    Results({**HEADER, "policies": policies}, path).close()
    with pytest.raises(FastKVError, match=r"with policies ….*window=39\"}\], not ….*window=50\"}\]; name") as complaint:
        Results({**HEADER, "policies": [*policies[:-1], {"label": "fastkv:window=50"}]}, path)
    assert len(str(complaint.value)) < 300 + len(str(path))


def test_the_same_example_twice(runner: Runner, scripted: Scripted, tmp_path: Path) -> None:
    """Two runs that wrote to one file at once."""
    path = tmp_path / "run.jsonl"
    stopped(runner, scripted, path, 3)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[2])
    with pytest.raises(FastKVError, match="line 5: has the same example and policy as a line before"):
        Results(HEADER, path)


def test_an_example_whose_text_has_changed(runner: Runner, scripted: Scripted, tmp_path: Path) -> None:
    """Half of its policies read the old text: the other half must not read another one."""
    path = tmp_path / "run.jsonl"
    stopped(runner, scripted, path, 1)
    header, record = path.read_text().splitlines()
    changed = {**json.loads(record), "prompt_sha256": "0" * 16}
    path.write_text(f"{header}\n{json.dumps(changed)}\n")
    with pytest.raises(FastKVError, match="was another text when the run began"):
        runner.run(Results(HEADER, path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": (9000,)}, "9000 tokens, but the model's context"),
        ({"lengths": (8190,)}, "ask for at most 8184"),
        ({"lengths": (400,), "max_tokens": 8000}, "an answer of 8000"),
        ({"lengths": (400,), "max_tokens": 8192}, "an answer of 8192 tokens leaves no room for a prompt in the 8192"),
        ({"lengths": (60,)}, "60 tokens are too short"),
        ({"tasks": (replace(GENERATED["archive"], most=1),)}, "1 examples in all, not 2"),
    ],
)
def test_a_plan_that_cannot_run(
    archive_llm: LLM, scripted: Scripted, change: dict[str, Any], says: str, build: Callable[[Plan], Runner]
) -> None:
    """It is refused before anything is asked."""
    with pytest.raises(FastKVError, match=says):
        build(replace(PLAN, **change))


@pytest.fixture
def build(archive_llm: LLM) -> Callable[[Plan], Runner]:
    return lambda plan: Runner(archive_llm, plan, parse_policies(LABELS))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["nope"], "--policy nope: policy must be one of"),
        (["full:window=3"], "--policy full:window=3: .*no setting of --policy full"),
        (["fastkv:kv_retention=2"], "kv_retention must be a number above 0 and at most 1, not 2"),
        (["fastkv:kv_retention=lots"], "kv_retention must be a number above 0 and at most 1, not 'lots'"),
        (["fastkv:window=2.5"], "window must be a whole number"),
        (["fastkv:kv_retention"], "'kv_retention' is no setting=value"),
        (["fastkv:=1"], "'=1' is no setting=value"),
        (["fastkv:tsp_layer=8"], "tsp_layer must be below"),
        (["fastkv:tsp_layer=2, tsp-layer=3"], "has tsp_layer twice"),
        (["fastkv", "fastkv:kv_retention=0.1"], "is the same policy as fastkv"),
    ],
)
def test_policies_that_are_none(texts: list[str], says: str) -> None:
    with pytest.raises(FastKVError, match=says):
        parse_policies(texts, n_layers=8)


def test_policies() -> None:
    full, fastkv = parse_policies(["full", "fastkv:kv-retention=0.05, tsp_len=64,pooling=avg"])
    assert (full.label, full.policy.name) == ("full", "full")
    settings = fastkv.policy.settings(8)
    assert (settings["kv_retention"], settings["tsp_len"], settings["pooling"]) == (0.05, 64, "avg")


def test_a_policy_s_entries_may_have_fewer_bits(archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this policy alone, and of one that is the same but for that."""
    texts = ["full", "full:kv_dtype=int8", "full:kv_dtype=int4"]
    specs = parse_policies(texts, archive_llm.config.n_layers)
    runner, real, found = Runner(archive_llm, PLAN, specs), archive_llm.generate, []

    def watched(*args: Any, **settings: Any) -> Output:
        found.append(real(*args, **settings))
        return found[-1]

    monkeypatch.setattr(archive_llm, "generate", watched)
    question = runner.question(PLAN.slots()[0])
    records = [runner.answer(question, spec) for spec in specs]
    assert [out.run.kv_dtype for out in found] == [None, "int8", "int4"]
    assert records[0].kv_bytes > records[1].kv_bytes > records[2].kv_bytes
    assert archive_llm.kv_dtype is None
    with pytest.raises(FastKVError, match=r"full:kv_dtype=int2: kv_dtype must be one of int8, int4"):
        parse_policies(["full:kv_dtype=int2"])
    with pytest.raises(FastKVError, match=r"is the same policy as full;"):
        parse_policies(["full", "full:kv_dtype=int8"], kv_dtype="int8")
    parse_policies(["full", "full:kv_dtype=int8"], kv_dtype="int4")


@pytest.mark.parametrize("command", [["--task", "archive"], ["turns"], ["compare", "--task", "archive"]])
@pytest.mark.parametrize("from_flag", [True, False])
def test_a_kv_dtype_that_does_not_go_is_named_as_it_was_typed(
    command: list[str], from_flag: bool, archive_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And found before the first question is put to the policy before it."""
    policy, flags = ("quest", ["--kv-dtype", "int8"]) if from_flag else ("quest:kv_dtype=int8", [])
    policies = ["--policy", "fastkv"] * (command[0] != "compare") + ["--policy", policy]
    length = ["--length", "512", "--examples", "1", "--quiet"]
    assert main([*command, "--model", str(archive_folder), *length, *policies, *flags]) == 2
    named = "--kv-dtype: " if from_flag else "--policy quest:kv_dtype=int8: "
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fastkv-eval: error: {named}")
    assert "whose steps look up single entries" in said.err
    assert len(said.err.splitlines()) == 1
