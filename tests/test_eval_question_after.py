"""Questions that come after the context was read: the same tokens, split where the question begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from fastkv import LLM, FastKVError, FullKV, SamplingParams
from fastkv.cache.policies import FastKV, GemFilter, SnapKV
from fastkv.eval.boundary import question_start
from fastkv.eval.cli import main
from fastkv.eval.conversation import Conversation
from fastkv.eval.example import Example, Slot
from fastkv.eval.policy_spec import parse_policies
from fastkv.eval.results import Record
from fastkv.eval.runner import Plan, Prompts, Runner
from fastkv.eval.table import AFTER_TITLE, render
from fastkv.eval.tasks import GENERATED
from fastkv.eval.tasks.longbench import fill, write
from fastkv.models.text.chat import ChatIds

MODEL = str(ROOT / "examples" / "archive" / "model")
SMALL = ["--model", MODEL, "--dtype", "float32", "--task", "archive", "--length", "400", "--depth", "0.5", "--quiet"]
SMALL += ["--examples", "1", "--policy", "full", "--policy", "fastkv:min_tokens=8"]

# Where the question begins

PIECES = ["a b", " c?", " d", "?", " ans", "wer"]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


@pytest.mark.parametrize(
    ("question", "start"),
    [("d? answer", 2), ("? answer", 3), ("c? d? answer", 1), ("b c? d? answer", 0), ("answer", 4), ("er", 5)],
)
def test_a_token_that_reaches_into_the_question_is_the_question_s(question: str, start: int) -> None:
    assert question_start([0, 1, 2, 3, 4, 5], question, decode) == start


def test_the_last_place_counts_and_what_is_not_there_has_none() -> None:
    assert question_start([3, 2, 3, 4], "?", decode) == 2
    assert question_start([0, 1], "d", decode) is None
    assert question_start([0, 1], "", decode) is None


@pytest.mark.parametrize("name", list(GENERATED))
def test_every_task_s_question_stands_at_its_end(archive_llm: LLM, name: str) -> None:
    """The two parts give the prompt's ids; the second one has question and lead, and at most a part of a word more."""
    task = GENERATED[name]
    plan = Plan((task,), (500,), (0.5,), 1)
    question = Runner(archive_llm, plan, parse_policies(["full"]), question_after=True).question(plan.slots()[0])
    known = Runner(archive_llm, plan, parse_policies(["full"])).question(plan.slots()[0])
    assert (question.ids, question.checksum) == (known.ids, known.checksum)
    assert known.asked_at is None
    assert question.asked_at is not None
    later = archive_llm.tokenizer.decode(question.ids[question.asked_at :])  # type: ignore[union-attr]
    asked = question.example.question + question.example.lead
    assert later.endswith(asked)
    assert len(later) - len(asked) < 8
    assert not any(answer in later for answer in question.example.answers)


class Templated:
    """Stands in for a model with a chat template: a system's words, the message, and the beginning of an answer."""

    def __init__(self, llm: LLM) -> None:
        self.tokenizer = llm.tokenizer

    def chat(self, messages: list[dict[str, str]]) -> ChatIds:
        assert self.tokenizer is not None
        ids = ChatIds(self.tokenizer.encode(f"System.\n{messages[0]['content'].strip()}\nThe answer: "))
        ids.tail, ids.ends = 4, frozenset([7])
        return ids


def test_a_template_s_end_comes_with_the_question(archive_llm: LLM) -> None:
    llm: Any = Templated(archive_llm)
    asked = "Question: The access code of the calm owl is"
    example = Example(f"Some words about it.\n\n{asked}\n", ("1",), "\nCode:", question=asked)
    for lead, end in ((True, "\nThe answer: Code:"), (False, "\nThe answer: ")):
        prompts = Prompts(llm, chat=True, lead=lead)
        ids = prompts.ids(example)
        at = prompts.asked_at(example, ids)
        assert prompts.decode(ids[at:]) == asked + end
        assert prompts.decode(ids[:at]) == "System.\nSome words about it.\n\n"
    few_shot = replace(example, chat=False)
    assert prompts.decode(prompts.ids(few_shot)[prompts.asked_at(few_shot, prompts.ids(few_shot)) :]) == f"{asked}\n"


@pytest.mark.parametrize(
    ("template", "question"),
    [
        ("Read.\n{context}\n\nQuestion: {input}\nAnswer:", "Question: I\nAnswer:"),
        ("{context}{input}Next:\n", "INext:"),
        ("{input} {context}\n\nAgain {input}.", "Again I."),
        ("{context}\n\nNow {{sum}} it up.", "Now {sum} it up."),
        ("{input}: {context}\n\nAnswer:", ""),
        ("{{context}} {input}", ""),
        ("{input}", ""),
    ],
)
def test_longbench_asks_after_its_context(template: str, question: str) -> None:
    text, asked = fill(template, {"context": "C {input}", "input": "I"})
    assert asked == question
    assert text.rstrip().endswith(question)


def test_a_prompt_that_lost_its_middle(archive_llm: LLM) -> None:
    """What is left of the question is still the question."""
    from fastkv.eval.example import Draw

    prompts = Prompts(archive_llm)
    asked = "Question: The access code of the calm owl is that of the bold fox, and which is it?"
    example = Example("The clerk sold a map. " * 40 + asked + "\n", ("1",), question=asked)
    for room, whole in ((100, True), (20, False)):
        slot = Slot("longbench:qasper", None, None, 0)
        cut = write(Draw(slot, 0, prompts.count, prompts.bare, prompts.decode, room), example)
        assert cut.cut
        assert (cut.question == asked) == whole
        assert cut.question
        assert asked.endswith(cut.question)
        assert prompts.asked_at(cut, prompts.ids(cut)) is not None


def test_what_cannot_be_split_is_refused(archive_llm: LLM) -> None:
    task = replace(GENERATED["archive"], write=lambda draw: Example("A text without a question", ("1",)))
    with pytest.raises(FastKVError, match="archive/tokens=400/depth=0/0 has no question that stands after its context"):
        Runner(archive_llm, Plan((task,), (400,), (0.0,), 1), parse_policies(["full"]), question_after=True)
    whole = replace(task, write=lambda draw: Example("All is asked?", ("1",), question="All is asked?"))
    with pytest.raises(FastKVError, match="leave it out of --task"):
        Runner(archive_llm, Plan((whole,), (400,), (0.0,), 1), parse_policies(["full"]), question_after=True)


# The answer


@pytest.fixture
def prompt(archive_llm: LLM) -> tuple[list[int], list[int]]:
    """Context and question."""
    plan = Plan((GENERATED["archive"],), (300,), (0.5,), 1)
    question = Runner(archive_llm, plan, parse_policies(["full"]), question_after=True).question(plan.slots()[0])
    return question.ids[: question.asked_at], question.ids[question.asked_at :]


def test_under_a_full_cache_nothing_changes(archive_llm: LLM, prompt: tuple[list[int], list[int]]) -> None:
    """Text, tokens, reason and every figure that is no time are those of the prompt in one piece."""
    context, question = prompt
    later = Conversation(archive_llm, FullKV(), context).ask(question, 8)
    known = archive_llm.generate(context + question, SamplingParams(max_tokens=8), FullKV())
    assert (later.text, later.token_ids, later.finish_reason) == (known.text, known.token_ids, known.finish_reason)
    assert later.run == known.run
    for name in ("prompt_tokens", "new_tokens", "kv_tokens", "kv_entries", "kv_full_entries", "kv_bytes"):
        assert getattr(later.metrics, name) == getattr(known.metrics, name), name
    assert later.metrics.kv_full_bytes == known.metrics.kv_full_bytes


@pytest.mark.parametrize("policy", [FastKV(min_tokens=8), SnapKV(min_tokens=8), GemFilter(min_tokens=8)])
def test_the_context_alone_is_compressed(archive_llm: LLM, prompt: tuple[list[int], list[int]], policy: Any) -> None:
    """Under policies that would choose again, too: a tenth of the context is kept, and all of the question."""
    context, question = prompt
    output = Conversation(archive_llm, policy, context).ask(question, 8)
    heads = archive_llm.config.n_layers * archive_llm.config.n_kv_heads
    assert output.metrics.kv_entries == heads * (int(0.1 * len(context)) + len(question))
    assert output.metrics.kv_full_entries == heads * (len(context) + len(question))
    assert output.metrics.prompt_tokens == len(context) + len(question)
    assert output.metrics.attention_kept is None
    assert output.run.policy == policy.name


def test_taken_back_and_asked_again(archive_llm: LLM, prompt: tuple[list[int], list[int]]) -> None:
    """The cache is what it was, and so is the answer."""
    context, question = prompt
    talk = Conversation(archive_llm, FastKV(min_tokens=8), context)

    def held() -> list[torch.Tensor]:
        snapshot = talk._session._held.snapshot
        assert snapshot is not None
        return [part.clone() for layer in snapshot.layers for part in layer.values()]

    before = held()
    first = talk.ask(question, 8)
    talk.rewind(len(context))
    assert talk.position == len(context)
    assert all(torch.equal(one, other) for one, other in zip(before, held(), strict=True))
    again = talk.ask(question, 8)
    assert (again.text, again.token_ids) == (first.text, first.token_ids)
    with pytest.raises(FastKVError, match="compressed"):
        talk.rewind(len(context) - 1)


def test_a_question_in_two_pieces(archive_llm: LLM, prompt: tuple[list[int], list[int]]) -> None:
    context, question = prompt
    talk = Conversation(archive_llm, FullKV(), context)
    talk.add(question[:3])
    assert (
        talk.ask(question[3:], 8).token_ids
        == archive_llm.generate(context + question, SamplingParams(max_tokens=8), FullKV()).token_ids
    )


def test_an_answer_ends_where_a_chat_s_does(archive_llm: LLM, prompt: tuple[list[int], list[int]]) -> None:
    context, question = prompt
    first = Conversation(archive_llm, FullKV(), context).ask(question, 3).token_ids
    ended = Conversation(archive_llm, FullKV(), context).ask(question, 3, ends=[first[1]])
    assert (ended.token_ids, ended.finish_reason) == (first[:2], "stop")


def test_a_chat_s_ends_reach_the_answer(archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the template's ids know, which the question's part of them no longer does by itself."""
    runner = Runner(
        archive_llm, Plan((GENERATED["archive"],), (300,), (0.5,), 1), parse_policies(["full"]), question_after=True
    )
    question = runner.question(Slot("archive", 300, 0.5, 0))
    first = archive_llm.generate(question.ids, SamplingParams(max_tokens=2), FullKV()).token_ids[1]
    ids = ChatIds(question.ids)
    ids.ends = frozenset([first])
    spec = parse_policies(["full"])[0]
    assert runner.answer(replace(question, ids=ids), spec).new_tokens == 2
    assert runner.answer(question, spec).new_tokens > 2


# The command


def test_the_run_says_which_mode_it_is(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In table and file; the same prompts as the other mode, whose files it refuses, and the other way round."""
    later, known = tmp_path / "later.jsonl", tmp_path / "known.jsonl"
    assert main([*SMALL, "--question-after", "--output", str(later)]) == 0
    out, _ = capfd.readouterr()
    assert out.startswith(AFTER_TITLE)
    assert "| policy | context, s | first token, s |" in out
    assert main([*SMALL, "--output", str(known)]) == 0
    assert AFTER_TITLE not in capfd.readouterr().out
    header, *records = map(json.loads, later.read_text().splitlines())
    assert header["question_after"] is True
    before, *others = map(json.loads, known.read_text().splitlines())
    assert "question_after" not in before
    assert [one["prompt_sha256"] for one in records] == [one["prompt_sha256"] for one in others]
    full, fast = sorted(records, key=lambda one: -one["kv_entries"])
    assert full["score"] == 1.0
    assert all(0 < one["context_tokens"] < one["prompt_tokens"] and one["context_s"] > 0 for one in records)
    after = fast["prompt_tokens"] - fast["context_tokens"]
    assert fast["kv_entries"] == 16 * (int(0.1 * fast["context_tokens"]) + after)
    assert main([*SMALL, "--output", str(later)]) == 2
    assert "is another run's, with question_after true, not null" in capfd.readouterr().err
    assert main([*SMALL, "--question-after", "--output", str(known)]) == 2
    assert "question_after null, not true" in capfd.readouterr().err
    assert main([*SMALL, "--question-after", "--output", str(later)]) == 0
    assert capfd.readouterr().out == out


def test_the_table_has_the_time_of_the_context() -> None:
    blank = Record("1", "full", "archive", 512, 0.5, 0, "", 500, 7, ("1",), "1", 1.0, 0.5, 100.0, 50, 100, 10, 100)
    records = [replace(blank, id=str(i), context_tokens=480, context_s=time) for i, time in enumerate((2.0, 4.0, 7.0))]
    text = render(records, ["full"])
    assert text.startswith(AFTER_TITLE)
    assert "| full | 4.000 | 0.500 | 100.0 |" in text
    assert "context, s" not in render([blank], ["full"])


def test_the_comparison(capfd: pytest.CaptureFixture[str]) -> None:
    """What was kept is counted from the context, and every policy kept the same."""
    line = [*SMALL[:-4], "--policy", "fastkv", "--policy", "adakv", "--question-after"]
    assert main(["compare", *line]) == 0
    out, _ = capfd.readouterr()
    assert out.startswith(AFTER_TITLE)
    assert "| context, s | × full | first token, s | × full |" in out
    assert "every policy but full kept int(0.1 · N) entries of a context of N tokens, and all of the question," in out
