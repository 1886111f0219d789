"""Several questions about one text: the texts, the two modes, and the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM, FastKVError, Metrics, Output, RunInfo
from fastkv.eval.cli import main
from fastkv.eval.conversation import Conversation
from fastkv.eval.example import Draw, Example, Slot
from fastkv.eval.policy_spec import parse_policies
from fastkv.eval.results import Record, Results
from fastkv.eval.runner import Prompts
from fastkv.eval.tasks.archive_text import SUBJECTS
from fastkv.eval.turns.families import FAMILIES
from fastkv.eval.turns.math_find import first_number
from fastkv.eval.turns.runner import REQUESTS, TURNS, Encoded, Plan, TurnsRunner
from fastkv.eval.turns.table import NO_TEXTS, TITLES, render
from fastkv.eval.turns.talk import Talk

MODEL = str(ROOT / "examples" / "archive" / "model")
LABELS = ["full", "fastkv:min_tokens=8"]
PLAN = Plan((FAMILIES["archive"],), (300,), examples=1, questions=3)
LONGEST_PIECE = 40  # tokens that what a text is filled with takes at most

# The texts


def written(llm: LLM, name: str, length: int = 1100, questions: int = 5, index: int = 0, seed: int = 0) -> Talk:
    prompts = Prompts(llm)
    slot = Slot(name, length, None, index)
    talk = FAMILIES[name].write(Draw(slot, seed, prompts.count, prompts.bare, prompts.decode), questions)
    assert length - LONGEST_PIECE < prompts.count(Example(talk.prompt, ())) <= length
    assert len({turn.asked.prompt for turn in talk.turns}) == len(talk.turns) == questions
    return talk


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_text_is_seeded_and_its_right_answers_are_right(archive_llm: LLM, name: str) -> None:
    """As long as asked, with so many different questions; a perfect model scores 1.0, and one that says nothing 0."""
    talk = written(archive_llm, name)
    assert talk == written(archive_llm, name)
    assert talk.prompt != written(archive_llm, name, index=1).prompt
    assert talk.prompt != written(archive_llm, name, seed=1).prompt
    assert len(written(archive_llm, name, questions=1).turns) == 1
    for turn in talk.turns:
        assert turn.score(turn.golden, turn.asked) == 1.0
        assert turn.score("", turn.asked) == 0.0
        assert not any(answer in turn.asked.text for answer in turn.asked.answers)


def test_keys_have_one_value(archive_llm: LLM) -> None:
    talk = written(archive_llm, "kv")
    pairs = re.findall(r"^(\S+): (\d{7})$", talk.prompt, re.MULTILINE)
    assert len(pairs) == len(dict(pairs)) > 20
    for turn in talk.turns:
        key = re.findall(r"of the key (\S+)\?", turn.asked.prompt)[0]
        assert (dict(pairs)[key],) == turn.asked.answers
    assert talk.turns[0].asked.text.endswith("is")


def test_one_word_begins_and_ends_so(archive_llm: LLM) -> None:
    """Others begin or end like it, and not all of them do."""
    talk = written(archive_llm, "prefix_suffix", 3000)
    words = talk.prompt.split("\n\n")[1].split("\n")
    shared = 0
    for turn in talk.turns:
        begin, end = re.findall(r'"(\w+)"', turn.asked.prompt)
        assert [word for word in words if word.startswith(begin) and word.endswith(end)] == list(turn.asked.answers)
        shared += sum(word.startswith(begin) or word.endswith(end) for word in words) - 1
    assert 0 < shared < len(words)
    assert len({word[:4] for word in words}) > 20 < len({word[-4:] for word in words})


def test_names_of_a_chain(archive_llm: LLM) -> None:
    talk = written(archive_llm, "variables")
    first = {value: name for name, value in re.findall(r"Variable (\w+) is set to (\d+)\.", talk.prompt)}
    later = {old: new for new, old in re.findall(r"Variable (\w+) is set to variable (\w+)\.", talk.prompt)}
    for turn in talk.turns:
        names = [first[re.findall(r"value (\d+),", turn.asked.prompt)[0]]]
        while names[-1] in later:
            names.append(later[names[-1]])
        assert tuple(names) == turn.asked.answers
        assert turn.score(f"{names[0]}, {names[2]}", turn.asked) == 2 / 5


def test_numbers_by_their_size(archive_llm: LLM) -> None:
    talk = written(archive_llm, "math_find", questions=20)
    numbers = sorted(map(int, re.findall(r"\d{5}", talk.prompt)))
    assert len(set(numbers)) == len(numbers)
    ranks = ("", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    for turn in talk.turns:
        rank, kind = re.findall(r"the (?:(\w+) )?(smallest|largest)", turn.asked.prompt)[0]
        place = ranks.index(rank)
        assert int(turn.asked.answers[0]) == (numbers[place] if kind == "smallest" else numbers[-1 - place])


@pytest.mark.parametrize(("said", "score"), [("12345.", 1.0), ("It is 12345", 1.0), ("1 12345", 0.0), ("123456", 0.0)])
def test_the_first_number_counts(said: str, score: float) -> None:
    assert first_number(said, Example("", ("12345",))) == score


@pytest.mark.parametrize("length", [450, 1100])
def test_a_label_can_be_learnt(archive_llm: LLM, length: int) -> None:
    """The same who, the same label; everyone who is asked about is among the shots, and no sentence is asked twice."""
    talk = written(archive_llm, "many_shot", length)
    shots = dict(re.findall(r"Sentence: (.*)\.\nLabel: (\w+)", talk.prompt))
    for turn in talk.turns:
        sentence = re.findall(r"Sentence: (.*)\.", turn.asked.prompt)[0]
        assert sentence not in shots
        (who,) = (subject for subject in SUBJECTS if sentence.startswith(f"{subject} "))
        assert {label for shot, label in shots.items() if shot.startswith(f"{who} ")} == set(turn.asked.answers)


def test_mixed_asks_in_turn(archive_llm: LLM) -> None:
    talk = written(archive_llm, "mixed")
    assert [len(turn.asked.answers) for turn in talk.turns] == [1, 5, 1, 5, 1]
    with pytest.raises(FastKVError, match=r"300 tokens, in two parts: .* are too short for task mixed"):
        written(archive_llm, "mixed", 300)


def test_codes_of_an_archive(archive_llm: LLM) -> None:
    talk = written(archive_llm, "archive", 600, questions=20)
    for turn in talk.turns:
        assert talk.prompt.count(f" is {turn.asked.answers[0]}.") == 1
    with pytest.raises(FastKVError, match="150 tokens are too short for 20 questions of task archive"):
        written(archive_llm, "archive", 150, questions=20)


# The two modes


def runner_of(llm: LLM, mode: str, plan: Plan = PLAN, labels: list[str] = LABELS) -> TurnsRunner:
    return TurnsRunner(llm, replace(plan, mode=mode), parse_policies(labels, llm.config.n_layers))


def test_what_stands_before_an_answer() -> None:
    """The whole conversation with its right answers, or the text alone; the room is that of the longest."""
    talk: Any = None
    encoded = Encoded(Slot("kv", 9, None, 0), talk, [1, 2], [[3], [4, 5]], [[6], [7]], [9, 2])
    assert encoded.before(0, TURNS) == encoded.before(0, REQUESTS) == [1, 2, 3]
    assert encoded.before(1, TURNS) == [1, 2, 3, 6, 4, 5]
    assert encoded.before(1, REQUESTS) == [1, 2, 4, 5]
    assert (encoded.room(TURNS), encoded.room(REQUESTS)) == (10, 10)
    assert replace(encoded, max_tokens=[1, 8]).room(TURNS) == 12


def test_the_first_turn_is_the_same_in_both_modes_and_the_text_stays_as_it_was(archive_llm: LLM) -> None:
    """Under a full cache every answer is that of the tokens in one piece; what was kept is kept for every question."""
    found: dict[str, Results] = {}
    for mode in (TURNS, REQUESTS):
        runner, found[mode] = runner_of(archive_llm, mode), Results({})
        runner.run(found[mode])
    turns, requests = found[TURNS].records, found[REQUESTS].records
    same = ("prediction", "prompt_sha256", "prompt_tokens", "kv_entries", "score", "id")
    for one, other in zip(turns, requests, strict=True):
        equal = [getattr(one, name) == getattr(other, name) for name in same]
        assert all(equal) or one.turn != 1
    encoded = runner.encoded(replace(PLAN, mode=REQUESTS).slots()[0])
    for k in range(3):
        for mode, records in ((TURNS, turns), (REQUESTS, requests)):
            full, fast = (next(r for r in records if (r.policy, r.turn) == (label, k + 1)) for label in LABELS)
            before = encoded.before(k, mode)
            whole = archive_llm.prefill(before, parse_policies(["full"])[0].policy, max_tokens=0)
            first = archive_llm.tokenizer.decode([int(whole.logits.argmax())])  # type: ignore[union-attr]
            assert full.prediction.startswith(first)
            assert full.prompt_tokens == len(before)
            assert full.kv_entries == full.kv_full_entries == 16 * len(before)
            after = len(before) - len(encoded.context)
            assert fast.kv_entries == 16 * (int(0.1 * len(encoded.context)) + after)
            assert fast.context_tokens == len(encoded.context)
    assert all(record.score == 1.0 for record in turns + requests if record.policy == "full")
    # Alone, a request gets the answer that it got after the others.
    alone = list(runner.answers(encoded, parse_policies(LABELS[1:])[0], [2]))
    assert [r.prediction for r in alone] == [r.prediction for r in requests if (r.policy, r.turn) == (LABELS[1], 3)]


class Scripted(Conversation):
    """Stands in for the model: remembers what the sequence was at each question, and is always right."""

    asked: list[list[int]]
    golden: dict[str, str]

    def __init__(self, llm: LLM, policy: Any, context: list[int]) -> None:
        self._ids, self.context_s = list(context), 0.1
        self._decode = llm.tokenizer.decode  # type: ignore[union-attr]

    @property
    def position(self) -> int:
        return len(self._ids)

    def add(self, ids: list[int]) -> None:
        self._ids += ids

    def ask(self, ids: list[int], max_tokens: int, ends: Any = ()) -> Output:
        self._ids += ids
        self.asked.append(list(self._ids))
        text = self.golden[self._decode(ids)]
        self._ids += [7, 7]
        metrics = Metrics(len(self._ids), 2, 0.1, 50.0, 10, 40, 400, 1000, 9000, 10, (), None)
        return Output(text, [7, 7], "length", metrics, RunInfo("full", {}, "cpu", "float32"))

    def rewind(self, position: int) -> None:
        del self._ids[position:]


@pytest.mark.parametrize("mode", [TURNS, REQUESTS])
def test_a_perfect_model_and_a_run_that_was_stopped(
    archive_llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    """Every score is 1.0. A run that goes on asks nothing twice, each question in its place, and finds the same."""
    plan = Plan((FAMILIES["mixed"], FAMILIES["kv"]), (800,), examples=2, questions=3, max_tokens=9)
    monkeypatch.setattr("fastkv.eval.turns.runner.Conversation", Scripted)
    runner, prompts = runner_of(archive_llm, mode, plan), Prompts(archive_llm)
    texts = [runner.encoded(slot) for slot in plan.slots()]
    Scripted.golden = {
        prompts.decode(ids): turn.golden
        for encoded in texts
        for ids, turn in zip(encoded.questions, encoded.talk.turns, strict=True)
    }
    Scripted.asked = []
    whole = Results({})
    runner.run(whole)
    assert [record.score for record in whole.records] == [1.0] * 24
    asked = Scripted.asked
    wanted = [encoded.before(k, mode) for encoded in texts for _ in LABELS for k in range(3)]
    assert asked == wanted

    def stop(record: Record, done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    Scripted.asked = []
    path = tmp_path / "run.jsonl"
    stopped = Results({}, path)
    with pytest.raises(KeyboardInterrupt):
        runner.run(stopped, stop)
    stopped.close()
    again = Results({}, path)
    runner.run(again)
    again.close()
    assert Scripted.asked == asked
    assert again.records == whole.records
    lines = path.read_text().splitlines()
    changed = {**json.loads(lines[-1]), "prompt_sha256": "0" * 16}
    path.write_text("\n".join([*lines[:-2], json.dumps(changed)]) + "\n")
    with pytest.raises(FastKVError, match="turn=3 was another text when the run began"):
        runner.run(Results({}, path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": (9000,)}, "the prompt has 89.. tokens, but the model's context"),
        ({"lengths": (8180,)}, "382 for the questions and answers of task variables .*; ask for at most 7810"),
        ({"lengths": (60,)}, "60 tokens are too short"),
    ],
)
def test_a_plan_that_cannot_run(archive_llm: LLM, change: dict[str, Any], says: str) -> None:
    with pytest.raises(FastKVError, match=says) as refused:
        runner_of(archive_llm, TURNS, replace(PLAN, families=(FAMILIES["variables"],), **change))
    assert refused.value.setting == "length"


# The table

BLANK = Record("", "full", "kv", 512, None, 0, "", 500, 7, ("1",), "1", 1.0, 0.5, 100.0, 50, 100, 10, 100)


def made_up(lengths: tuple[int, ...] = (512,), tasks: tuple[str, ...] = ("kv",)) -> list[Record]:
    """Full is always right; the other policy in the first turn only."""
    return [
        replace(
            BLANK, id=f"{task}/{length}/{index}/turn={turn}", policy=label, task=task, length=length, index=index,
            score=float(label == "full" or turn == 1), turn=turn, context_s=2.0, context_tokens=480,
        )
        for task in tasks for length in lengths for index in range(2) for label in ("full", "fastkv") for turn in (1, 2)
    ]  # fmt: skip


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_table_for_each_policy_overall_and_by_turn() -> None:
    text = render(made_up(), ["full", "fastkv"], 2, REQUESTS)
    assert text.startswith(TITLES[REQUESTS])
    table = rows(text)
    assert table[0] == ["task", "tokens", "texts", "all turns", "turn 1", "turn 2"]
    assert [cell.split(" ")[0] for cell in table[2]] == ["kv", "512", "2", "100.0", "100.0", "100.0"]
    assert table[3][3:5] == ["all turns", "− full"]
    assert [cell.split(" ")[0] for cell in table[5]] == ["kv", "512", "2", "50.0", "−50.0", "100.0", "0.0"]
    assert table[-1] == ["fastkv", "2.000", "0.500", "100.0", "10.0 %"]
    assert text.index("### full") < text.index("### fastkv")
    several = rows(render(made_up((512, 1024), ("kv", "vt")), ["full", "fastkv"], 2, TURNS))
    kinds = [("kv", "512"), ("kv", "1,024"), ("kv", "all"), ("vt", "512"), ("vt", "1,024"), ("vt", "all"), ("all",) * 2]
    assert [(row[0], row[1]) for row in several[2:9]] == kinds


def test_only_texts_that_are_finished_count() -> None:
    records = made_up()
    assert "| kv | 512 | 1 |" in render(records[:-1], ["full", "fastkv"], 2, TURNS)
    assert render(records[:3], ["full", "fastkv"], 2, TURNS) == NO_TEXTS


# The command

SMALL = ["turns", "--model", MODEL, "--dtype", "float32", "--task", "archive", "--length", "300", "--examples", "1"]
SMALL += ["--questions", "2", "--policy", "full", "--quiet"]


def test_the_bundled_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each mode in a file of its own, which no other command continues; again, nothing is asked."""
    path = tmp_path / "run.jsonl"
    assert main([*SMALL, "--output", str(path)]) == 0
    out, err = capfd.readouterr()
    assert (out.split("\n")[0], err) == (TITLES[TURNS], "")
    assert "| archive | 300 | 1 | 100.0 (20.7 – 100.0) | 100.0 (20.7 – 100.0) | 100.0 (20.7 – 100.0) |" in out
    header, *records = map(json.loads, path.read_text().splitlines())
    assert (header["turns"], header["questions"], header["tasks"]) == ("turns", 2, ["archive"])
    assert [record["turn"] for record in records] == [1, 2]
    assert main([*SMALL, "--output", str(path)]) == 0
    assert capfd.readouterr().out == out
    assert main([*SMALL, "--output", str(path), "--mode", "requests"]) == 2
    assert 'is another run\'s, with turns "turns", not "requests"' in capfd.readouterr().err
    tasks = ["--model", MODEL, "--task", "archive", "--length", "300", "--examples", "1", "--output", str(path)]
    assert main(tasks) == 2
    assert "is another run's" in capfd.readouterr().err


def test_a_run_that_is_interrupted(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    assert main(SMALL[:-1]) == 130
    out, err = capfd.readouterr()
    assert out == NO_TEXTS
    assert err == "interrupted with 2 answers to go: nothing was kept: there is no --output\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "--model"),
        ("--model {model} --task niah_single", "--task: task must be one of kv, prefix_suffix"),
        ("--model {model} --mode both", "--mode: mode must be one of turns, requests"),
        ("--model {model} --questions 0", "--questions"),
        ("--model {model} --questions 21", "--questions"),
        ("--model {model} --examples 0", "--examples"),
        ("--model {model} --length 0", "--length"),
        ("--model {model} --length 60 --task variables", "--length: 60 tokens are too short for task variables"),
        ("--model {model} --length 8190", "--length: 81"),
        ("--model {model} --policy snap", "--policy snap: policy must be one of"),
        ("--model {model} --output no/such/run.jsonl", "--output: no/such/run.jsonl: cannot be written"),
        ("--model {model} --depth 0.5", "--depth"),
        ("--model {tiny}", "--model: the model has no tokenizer"),
    ],
)
def test_mistakes(capfd: pytest.CaptureFixture[str], tiny_folder: Path, arguments: str, says: str) -> None:
    try:
        status: Any = main(["turns", *arguments.format(model=MODEL, tiny=tiny_folder).split()])
    except SystemExit as left:  # the parser's own complaints
        status = left.code
    out, err = capfd.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("fastkv-eval: error: ")
    assert says in err
