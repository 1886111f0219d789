"""LongBench in fastkv-eval: the metrics by hand and against other computations, and a made-up copy of its files."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FastKVError
from fastkv.eval import longbench as metrics
from fastkv.eval.example import Draw, Example, Slot, Task
from fastkv.eval.longbench import METRICS, longbench_score
from fastkv.eval.policy_spec import parse_policies
from fastkv.eval.runner import Plan, Prompts, Runner, longest_prompt
from fastkv.eval.tasks import build_tasks
from fastkv.eval.tasks.longbench import fill

TEMPLATES = {
    "qasper": "Read this.\n{context}\nNow answer: {input}",
    "trec": "{context}\n{input}",
    "lcc": "Go on:\n{context}Next line:\n",
    "passage_retrieval_en": "{context}\nWhich paragraph? {input}",
}
LONGEST = {"qasper": 6, "trec": 5, "lcc": 7, "passage_retrieval_en": 4}


def line(**fields: Any) -> str:
    usual = {"input": "Who?", "context": "Ada did.", "answers": ["Ada"], "all_classes": None, "length": 2, "_id": "x"}
    return json.dumps({**usual, **fields}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four datasets: two examples of qasper, the second of which is long, and one or two of each other."""
    pytest.importorskip("rapidfuzz")  # of lcc
    copy = tmp_path / "copy"
    (copy / "config").mkdir(parents=True)
    (copy / "data").mkdir()
    (copy / "config" / "dataset2prompt.json").write_text(json.dumps(TEMPLATES))
    (copy / "config" / "dataset2maxlen.json").write_text(json.dumps(LONGEST))
    words = " ".join(f"word{i}" for i in range(400))
    (copy / "qasper.jsonl").write_text(line() + line(context=words, answers=["word", "Ada Lovelace"]))
    (copy / "trec.jsonl").write_text(line(answers=["City"], all_classes=["City", "Color"]) * 2)
    (copy / "data" / "lcc.jsonl").write_text(line(answers=["return 1"], context="def one():\n"))
    (copy / "passage_retrieval_en.jsonl").write_text(line(answers=["Paragraph 12"]))
    return copy


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "expected"),
    [
        ("qa_f1_score", "The cat, sat!", "a cat SAT", 1.0),
        ("qa_f1_score", "cat cat dog", "cat bird", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("qa_f1_score", "it's another theme", "its other theme", 2 / 3),  # articles are whole words
        ("qa_f1_score", "the", "the", 0.0),
        ("count_score", "12 or 7, no: 12.", "12", 2 / 3),
        ("count_score", "none", "12", 0.0),
        ("count_score", "112", "12", 0.0),
        ("retrieval_score", "Paragraph 3 and 12", "Paragraph 12", 0.5),
        ("retrieval_zh_score", "段落12", "段落12", 1.0),
        ("code_sim_score", "\n\n# no\n```python\nab // c\nreturn 1\nx", "return 1", 1.0),
        ("code_sim_score", "# only", "x", 0.0),
        ("code_sim_score", "abcd", "abxy", 0.5),
        ("rouge_score", "a b c d", "a x c y", 0.5),
        ("rouge_score", "", "a", 0.0),
        ("rouge_score", "...", "a", 0.0),
        # By hand: LCS of the one answer sentence with either sentence is {a, b} and {d}; 3 of 3 and 3 of 5 words.
        ("rouge_score", "a b x. y d.", "a b d", 2 * 1 * 0.6 / 1.6),
    ],
)
def test_metrics_by_hand(metric: str, prediction: str, answer: str, expected: float) -> None:
    _needed(metric)
    assert getattr(metrics, metric)(prediction, answer) == pytest.approx(expected, abs=1e-6)


def _needed(metric: str) -> None:
    for part, package in (("rouge", "rouge"), ("code", "rapidfuzz")):
        if metric.startswith(part):
            pytest.importorskip(package)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("City", 1.0), ("City, or Color", 0.5), ("Color", 0.0), ("", 0.0), ("a Plant life form", 1.0), ("Plant", 0.0)],
)
def test_classification(prediction: str, expected: float) -> None:
    """Every class that is named shares the point, but one whose name is only a part of the right one's."""
    right = "Plant life" if "Plant" in prediction else "City"
    assert metrics.classification_score(prediction, right, ("City", "Color", "Plant", "Plant life")) == expected


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    above = [0] * (len(b) + 1)
    for one in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if one == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def test_rouge_and_code_similarity_against_their_definitions() -> None:
    """Both are 2 · LCS over both sizes: of words in one sentence that has none twice, and of characters."""
    pytest.importorskip("rouge")
    pytest.importorskip("rapidfuzz")
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.sample("abcdefghijkl", rng.randrange(1, 12)) for _ in range(2))
        expected = 2 * common(a, b) / (len(a) + len(b))
        assert metrics.rouge_score(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-6)
        a, b = ([rng.choice("ab (.") for _ in range(rng.randrange(1, 30))] for _ in range(2))
        expected = 2 * common(a, b) / (len(a) + len(b))
        assert metrics.code_sim_score("".join(a), "".join(b)) == pytest.approx(expected, abs=0.005 + 1e-9)


def test_a_long_sentence_is_scored() -> None:
    """The package recurses a word at a time; past the usual depth it would raise."""
    pytest.importorskip("rouge")
    before, usual = sys.getrecursionlimit(), 300  # the work grows with its square
    words = " ".join(f"w{i}" for i in range(usual))
    sys.setrecursionlimit(usual)
    try:
        assert metrics.rouge_score(words, words) == pytest.approx(1)
        assert sys.getrecursionlimit() == usual
    finally:
        sys.setrecursionlimit(before)


def test_chinese() -> None:
    pytest.importorskip("jieba")
    assert metrics.qa_f1_zh_score("北京。大学", "“北京”，大学！") == 1.0
    assert metrics.rouge_zh_score("我们 研究", "我们研究") == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("dataset", "prediction", "answers", "score"),
    [
        ("qasper", "Ada", ("Babbage", "Ada"), 1.0),  # the best of the answers
        ("qasper", "Ada\nBabbage", ("Ada",), 2 / 3),
        ("triviaqa", "\n\nAda\nQuestion: next", ("Ada",), 1.0),  # the first line alone
        ("trec", "\nCity\nColor", ("City",), 1.0),
        ("lsht", "Color\nCity", ("City",), 0.0),
    ],
)
def test_datasets(dataset: str, prediction: str, answers: tuple[str, ...], score: float) -> None:
    assert longbench_score(dataset, prediction, Example("", answers, classes=("City", "Color"))) == pytest.approx(score)


def test_all_21_datasets_have_a_metric() -> None:
    assert len(METRICS) == 21
    assert METRICS["gov_report"] is METRICS["samsum"] is metrics.rouge_score
    assert METRICS["lcc"] is METRICS["repobench-p"] is metrics.code_sim_score


@pytest.mark.parametrize(
    ("dataset", "module", "says"),
    [
        ("samsum", "rouge", 'longbench:samsum: its metric needs the package rouge: pip install "fastkv[eval]"'),
        ("lcc", "rapidfuzz.fuzz", 'longbench:lcc: its metric needs the package rapidfuzz: pip install "fastkv'),
        ("dureader", "jieba", "longbench:dureader: its metric needs the package jieba: pip install jieba, or leave"),
    ],
)
def test_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, module: str, says: str) -> None:
    """Is named before anything runs, with the command that brings it."""
    for name, value in (("prompt", "{context}"), ("maxlen", 5)):
        (folder / "config" / f"dataset2{name}.json").write_text(json.dumps({dataset: value}))
    (folder / f"{dataset}.jsonl").write_text(line())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FastKVError) as raised:
        build_tasks([f"longbench:{dataset}"], longbench=folder)
    assert str(raised.value).startswith(says)


def write(task: Task, prompts: Prompts, room: int, index: int = 0) -> Example:
    slot = Slot(task.name, None, None, index)
    return task.write(Draw(slot, 0, prompts.count, prompts.bare, prompts.decode, room))


def test_the_files_make_the_tasks(folder: Path, archive_llm: LLM) -> None:
    """Templates and answer lengths are the user's own; the datasets come in LongBench's order."""
    tasks = build_tasks(["longbench", "vt", "longbench:trec"], longbench=folder)
    names = ["longbench:qasper", "longbench:trec", "longbench:passage_retrieval_en", "longbench:lcc", "vt"]
    assert [task.name for task in tasks] == names
    assert [task.max_new_tokens for task in tasks[:4]] == [6, 5, 4, 7]
    assert [task.most for task in tasks[:4]] == [2, 2, 1, 1]
    example = write(tasks[0], Prompts(archive_llm), 100)
    assert (example.prompt, example.answers, example.cut) == ("Read this.\nAda did.\nNow answer: Who?", ("Ada",), False)
    assert write(tasks[1], Prompts(archive_llm), 100).classes == ("City", "Color")
    assert tasks[0].source != build_tasks(["longbench:trec"], longbench=folder)[0].source


@pytest.mark.parametrize("changed", [("prompt", {"qasper": "{context} {input}"}), ("maxlen", {"qasper": 7})])
def test_the_settings_are_part_of_the_checksum(folder: Path, changed: tuple[str, dict[str, Any]]) -> None:
    """A run must not continue with other prompts or shorter answers than it began with."""
    (before,) = build_tasks(["longbench:qasper"], longbench=folder)
    (folder / "config" / f"dataset2{changed[0]}.json").write_text(json.dumps(changed[1]))
    assert build_tasks(["longbench:qasper"], longbench=folder)[0].source != before.source


@pytest.mark.parametrize("room", [60, 201, 1000])
@pytest.mark.parametrize("chat", [False, True])
def test_a_long_prompt_loses_its_middle(folder: Path, chat_folder: Path, room: int, chat: bool) -> None:
    """Half of the room from either end, as many tokens as there is room for, chat template and BOS included."""
    prompts = Prompts(LLM(chat_folder, dtype="float32", device="cpu"), chat)
    (task,) = build_tasks(["longbench:qasper"], longbench=folder)
    whole = write(task, prompts, 10**6, index=1)
    example = write(task, prompts, room, index=1)
    assert (whole.cut, example.cut) == (False, True)
    assert room - 8 <= prompts.count(example) <= room
    start = next(i for i, (a, b) in enumerate(zip(example.prompt, whole.prompt, strict=False)) if a != b)
    head, tail = example.prompt[:start], example.prompt[start:]
    assert whole.prompt.startswith(head)
    assert whole.prompt.endswith(tail)
    assert len(prompts.bare(head)) == pytest.approx(len(prompts.bare(tail)), abs=4)
    assert example.prompt.endswith("Now answer: Who?")
    assert (example.answers, example.classes) == (whole.answers, whole.classes)


def test_halves_that_come_out_longer_than_their_tokens(folder: Path) -> None:
    """A tokenizer may need more for the joined text: it is cut again until it fits."""
    (task,) = build_tasks(["longbench:qasper"], longbench=folder)
    draw = Draw(
        Slot(task.name, None, None, 1),
        0,
        count=lambda example: len(example.text) + (5 if example.cut else 0),
        encode=lambda text: list(map(ord, text)),
        decode=lambda ids: "".join(map(chr, ids)),
        room=100,
    )
    assert 98 <= draw.count(task.write(draw)) <= 100


@pytest.fixture
def chat_folder(archive_folder: Path, tmp_path: Path) -> Path:
    model = tmp_path / "model"
    shutil.copytree(archive_folder, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}Bot:")
    return model


def test_few_shot_and_code_prompts_get_no_chat_template(folder: Path, chat_folder: Path) -> None:
    llm = LLM(chat_folder, dtype="float32", device="cpu")
    prompts = Prompts(llm, chat=True)
    for task in build_tasks(["longbench"], longbench=folder):
        text = prompts.decode(prompts.ids(write(task, prompts, 1000)))
        assert text.endswith("Bot:") == (task.name in ("longbench:qasper", "longbench:passage_retrieval_en"))


def test_templates() -> None:
    assert fill("{{{context}}} {input}{input} {n}", {"context": "{input}", "input": "I", "n": 3})[0] == "{{input}} II 3"
    for wrong in ("{other}", "{}", "{0}", "{input.real}", "{input!r}", "{input:>9}", "{input", "}"):
        with pytest.raises(FastKVError, match="template in dataset2prompt"):
            fill(wrong, {"input": "I"})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config/dataset2prompt.json", None, "has no dataset2prompt.json, neither itself nor in its config"),
        ("config/dataset2prompt.json", "[", "is no JSON object with an entry for each dataset"),
        ("config/dataset2prompt.json", "{}", "dataset2prompt.json has no template for qasper"),
        ("config/dataset2prompt.json", '{"qasper": "{what}"}', "line 1: there is no text for {what}"),
        ("config/dataset2maxlen.json", '{"qasper": "5"}', "dataset2maxlen.json has no number of tokens for qasper"),
        ("config/dataset2maxlen.json", '{"qasper": true}', "dataset2maxlen.json has no number of tokens for qasper"),
        ("qasper.jsonl", None, "has no qasper.jsonl, neither itself nor in its data"),
        ("qasper.jsonl", "", "qasper.jsonl: has no lines"),
        ("qasper.jsonl", line() + "[]\n", "qasper.jsonl, line 2: is no object"),
        ("qasper.jsonl", line(answers="Ada"), "line 1: answers must be a list of strings"),
        ("qasper.jsonl", line(answers=[]), "line 1: answers must be a list of strings"),
        ("qasper.jsonl", line(context=None), "line 1: there is no text for {context}"),
    ],
)
def test_a_broken_copy(folder: Path, name: str, content: str | None, says: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(FastKVError) as raised:
        build_tasks(["longbench:qasper"], longbench=folder)
    assert says in str(raised.value)
    assert raised.value.setting == "longbench"


@pytest.mark.parametrize(
    ("dataset", "fields", "says"),
    [
        ("trec", {}, "all_classes must be a list of strings for trec"),
        ("passage_retrieval_en", {}, "'Ada' names no Paragraph by its number"),
    ],
)
def test_answers_that_cannot_be_scored(folder: Path, dataset: str, fields: dict[str, Any], says: str) -> None:
    (folder / f"{dataset}.jsonl").write_text(line(**fields))
    with pytest.raises(FastKVError, match=f"line 1: .*{says}"):
        build_tasks([f"longbench:{dataset}"], longbench=folder)


def test_which_examples_a_run_has(folder: Path) -> None:
    """All of each dataset, or the first so many, once each, whatever the lengths of other tasks."""
    tasks = build_tasks(["longbench:qasper", "longbench:lcc", "vt"], longbench=folder)
    plan = Plan(tuple(tasks), (500, 900), (0.0,), examples=3)
    ids = [slot.id for slot in plan.slots()]
    assert [one for one in ids if "longbench" in one] == ["longbench:qasper/0", "longbench:lcc/0", "longbench:qasper/1"]
    assert sum("vt" in one for one in ids) == 6
    few = replace(plan, longbench_examples=1)
    assert [slot.id for slot in few.slots() if slot.length is None] == ["longbench:qasper/0", "longbench:lcc/0"]


def test_the_room_is_what_every_policy_reads(archive_llm: LLM) -> None:
    """Under a sliding window a policy that drops tokens reads the window alone, and all policies get the same text."""
    config = replace(archive_llm.config, sliding_windows=(512,) * archive_llm.config.n_layers)
    full, fastkv = (one.policy for one in parse_policies(["full", "fastkv"]))
    assert longest_prompt(config, [full], 12) == config.context_length - 12
    assert longest_prompt(config, [full, fastkv], 12) == 500
    assert longest_prompt(archive_llm.config, [full, fastkv], 12) == config.context_length - 12
    with pytest.raises(FastKVError, match="an answer of 512 tokens leaves no room"):
        longest_prompt(config, [fastkv], 512)


def test_a_length_that_does_not_fit(folder: Path, archive_llm: LLM) -> None:
    tasks = tuple(build_tasks(["longbench:qasper"], longbench=folder))
    plan = Plan(tasks, (), (), examples=1, longbench_tokens=8190)
    with pytest.raises(FastKVError, match="8190 tokens and an answer of 6") as raised:
        Runner(archive_llm, plan, parse_policies(["full"]))
    assert raised.value.setting == "longbench_tokens"
