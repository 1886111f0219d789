"""fastkv-run on one document: read once, then asked many things, saved, and taken up again."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FullKV, SamplingParams, SnapKV
from fastkv.cli import main
from fastkv.console.machine import fingerprint
from fastkv.console.policy_file import remember
from fastkv.engine import decode_batch
from fastkv.engine.decode_batch import DecodeBatch
from fastkv.engine.session import DEFAULT_POLICY

Run = Callable[..., tuple[int, str, str]]
PARAMS = SamplingParams(max_tokens=6)
DOCUMENT = "The access code of the old mill is 1111. " + "A quiet neighbor found a small boat. " * 8 + "\n"
QUESTIONS = {"one.txt": "The access code of the old mill is", "two.txt": "A quiet", "three.txt": "\nThe"}
SMALL = ["--policy", "snapkv", "--kv-len", "24"]
ASKED = ["--context", "doc.txt", *(word for name in QUESTIONS for word in ("--prompt", name))]


@pytest.fixture(scope="module")
def chat_folder(archive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template that cuts blanks off a message."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(archive_folder, folder)
    each = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(each + "{% if add_generation_prompt %}assistant: {% endif %}")
    return folder


@pytest.fixture
def run(
    archive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """fastkv-run in a folder with a document and three questions: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name, text in {**QUESTIONS, "doc.txt": DOCUMENT}.items():
        Path(name).write_text(text)

    def call(*argv: str, model: Path = archive_folder) -> tuple[int, str, str]:
        status = main(["--model", str(model), "--device", "cpu", "--dtype", "float32", *argv])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefill of the command reads."""
    counts: list[int] = []
    real = decode_batch.prefill

    def counted(model: Any, ids: Any, *rest: Any, **named: Any) -> Any:
        counts.append(ids.shape[1])
        return real(model, ids, *rest, **named)

    monkeypatch.setattr(decode_batch, "prefill", counted)
    return counts


def expected(llm: LLM, policy: Any = None) -> dict[str, str]:
    """The answer to each question, by a session of the library."""
    session = llm.session(SnapKV(kv_len=24) if policy is None else policy)
    session.add(DOCUMENT)
    return {name: session.fork().generate(text, PARAMS).text for name, text in QUESTIONS.items()}


def figures(err: str) -> dict[str, str]:
    return {line[:12].strip(): line[13:] for line in err.splitlines()}


# --- on standard output ---


def test_answers_in_order_and_the_document_read_once(run: Run, archive_llm: LLM, read: list[int]) -> None:
    answers = expected(archive_llm)
    read.clear()
    status, out, err = run(*ASKED, *SMALL, "--max-tokens", "6")
    document, *questions = read
    assert (status, out) == (0, "".join(f"{text}\n" for text in answers.values()))
    assert (len(questions), max(questions) < 10 < document) == (3, True)
    lines = err.splitlines()
    names = [line for line in lines if line in QUESTIONS]
    assert names == list(QUESTIONS)
    head = figures("\n".join(lines[: lines.index("one.txt")]))
    assert head["policy"] == "snapkv, on cpu in float32"
    assert head["context"].startswith(f"{document:,} tokens of doc.txt, read in ")
    assert head["KV kept"].startswith(f"{24 * 16:,} of {document * 16:,} entries (")
    assert f"prompt       {questions[0]} tokens, after {document:,} that had been read" in lines
    assert [line[:12].strip() for line in lines].count("policy") == 1


def test_quiet_is_quiet(run: Run) -> None:
    assert run(*ASKED, "--max-tokens", "1", "--quiet")[2] == ""


def test_one_question_is_told_as_one_prompt(run: Run, archive_llm: LLM) -> None:
    """Its text and nothing else, or one object; the newline between document and question is the document's own."""
    one = ["--context", "doc.txt", "--prompt", "two.txt", "--policy", "full", "--max-tokens", "6"]
    whole = archive_llm.generate(DOCUMENT + QUESTIONS["two.txt"], PARAMS, FullKV())
    assert run(*one)[:2] == (0, whole.text)
    told = json.loads(run(*one, "--json", "--quiet")[1])
    assert (told["text"], told["policy"]) == (whole.text, {"name": "full"})
    metrics = told["metrics"]
    assert metrics["reused_tokens"] + metrics["prompt_tokens"] == whole.metrics.prompt_tokens
    assert metrics["prompt_tokens"] < 5


def test_the_document_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--prompt", "one.txt", *SMALL, "--max-tokens", "6"]
    text = run("--context", "doc.txt", *argv)[1]
    with open("doc.txt") as document:
        monkeypatch.setattr("sys.stdin", document)
        status, out, err = run("--context", "-", *argv)
    assert (status, out) == (0, text)
    assert "tokens of standard input, read in" in err


def test_ctrl_c_ends_the_questions(run: Run, archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, steps, real = expected(archive_llm), 0, DecodeBatch.read

    def interrupted(batch: DecodeBatch) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:
            signal.raise_signal(signal.SIGINT)
        return real(batch)

    monkeypatch.setattr(DecodeBatch, "read", interrupted)
    status, out, err = run(*ASKED, *SMALL, "--max-tokens", "6")
    first, second, rest = out.split("\n")
    assert (status, first, rest) == (130, answers["one.txt"], "")
    assert answers["two.txt"].startswith(second)
    assert second != answers["two.txt"]
    assert "three.txt" not in err.splitlines()


# --- in a chat ---


@pytest.mark.parametrize("system", [[], ["--system", "Be brief."]], ids=["", "system"])
def test_document_and_question_are_one_message(run: Run, chat_folder: Path, read: list[int], system: list[str]) -> None:
    llm = LLM(chat_folder, dtype="float32", device="cpu")
    before = [{"role": "system", "content": system[1]}] if system else []
    texts = [f"{DOCUMENT[:-1]}\n\n{question}" for question in QUESTIONS.values()]
    whole = [llm.chat([*before, {"role": "user", "content": text}]) for text in texts]
    answers = [llm.generate(ids, PARAMS, FullKV()).text for ids in whole]
    read.clear()
    out = run(*ASKED, "--chat", *system, "--policy", "full", "--max-tokens", "6", model=chat_folder)[1]
    assert out == "".join(f"{answer}\n" for answer in answers)
    document, *questions = read
    assert [document + count for count in questions] == [*map(len, whole)]
    assert max(questions) < 30 < document


# --- into a file ---


def records() -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in map(json.loads, Path("out.jsonl").read_text().splitlines())}


def test_records_of_questions(run: Run, archive_llm: LLM, read: list[int]) -> None:
    status, out, err = run(*ASKED, *SMALL, "--max-tokens", "6", "--output", "out.jsonl", "--batch-size", "2")
    assert (status, out, len(read)) == (0, "", 4)
    assert {name: record["text"] for name, record in records().items()} == expected(archive_llm)
    assert {(record["context"], record["policy"]["name"]) for record in records().values()} == {("doc.txt", "snapkv")}
    assert all(record["metrics"]["reused_tokens"] == read[0] for record in records().values())
    assert [line.split()[0] for line in err.splitlines()] == ["policy", "context", "KV", "3"]


def test_records_are_of_one_document(run: Run, read: list[int]) -> None:
    """One that has all its answers is not read again; another one is never continued by mistake."""
    argv = [*ASKED, *SMALL, "--max-tokens", "2", "--output", "out.jsonl"]
    assert run(*argv)[0] == 0
    read.clear()
    status, _, err = run(*argv)
    assert (status, read) == (0, [])
    assert "3 were there already" in err
    plain = [word for word in argv if word not in ("--context", "doc.txt")]
    shutil.copy("doc.txt", "copy.txt")
    other = ["copy.txt" if word == "doc.txt" else word for word in argv]
    for changed, named in ((plain, 'context "doc.txt", not null'), (other, 'context "doc.txt", not "copy.txt"')):
        status, _, err = run(*changed)
        assert status == 2
        assert f"out.jsonl, line 1: was made with {named}; name another file" in err
    Path("doc.txt").write_text("Another one.")
    status, _, err = run(*argv)
    assert (status, read) == (2, [])
    assert "was made with context_sha256 " in err
    Path("out.jsonl").unlink()
    assert run(*plain)[0] == 0
    assert 'was made with context null, not "doc.txt"' in run(*argv)[2]


# --- saved, and taken up again ---


@pytest.mark.parametrize("chat", [[], ["--chat", "--system", "Be brief."]], ids=["", "chat"])
def test_a_document_that_was_saved_is_not_read_again(
    run: Run, chat_folder: Path, read: list[int], chat: list[str]
) -> None:
    answers = run(*ASKED, *SMALL, *chat, "--max-tokens", "6", "--quiet", model=chat_folder)
    read.clear()
    saving = ["--context", "doc.txt", *SMALL, *chat, "--save-cache", "doc.kv"]
    status, out, err = run(*saving, model=chat_folder)
    assert (status, out, len(read)) == (0, "", 1)
    assert [line[:12].strip() for line in err.splitlines()] == ["policy", "context", "KV kept", "saved"]
    assert figures(err)["saved"].startswith("doc.kv, ")
    asked = ["--cache", "doc.kv", *ASKED[2:], *chat[:1], "--max-tokens", "6"]
    read.clear()
    assert run(*asked, "--quiet", model=chat_folder) == answers
    assert max(read) < 30
    assert run(*asked, "--output", "out.jsonl", model=chat_folder)[0] == 0
    assert "".join(f"{record['text']}\n" for record in records().values()) == answers[1]
    assert {(record["context"], record["policy"]["name"]) for record in records().values()} == {("doc.kv", "snapkv")}
    assert "3 were there already" in run(*asked, "--output", "out.jsonl", model=chat_folder)[2]
    wrong = ["--cache", "doc.kv", "--prompt", "one.txt", *([] if chat else ["--chat"])]
    status, _, err = run(*wrong, model=chat_folder)
    assert status == 2
    assert ("--cache: doc.kv: was read with" + ("" if chat else "out") + " --chat: ") in err


def test_questions_may_come_with_the_saving(run: Run) -> None:
    argv = [*ASKED, *SMALL, "--max-tokens", "2", "--quiet"]
    assert run(*argv, "--save-cache", "doc.kv") == run(*argv)
    assert Path("doc.kv").exists()


# --- which policy ---


def test_the_policy_is_that_of_sessions(run: Run, archive_folder: Path) -> None:
    """Not what was tuned for prompts that end with their question; a file that is named is taken."""
    argv = ["--context", "doc.txt", "--prompt", "one.txt", "--max-tokens", "1", "--json"]
    settings = {"kv_len": 30}
    file = {"date": "2026-11-27", "files": fingerprint(archive_folder), "policy": "snapkv", "settings": settings}
    path = remember(file)
    told = json.loads(run(*argv)[1])["policy"]
    assert told == {"name": DEFAULT_POLICY.name, **json.loads(json.dumps(DEFAULT_POLICY.settings(8)))}
    _, out, err = run(*argv, "--policy-file", str(path))
    assert json.loads(out)["policy"]["kv_len"] == 30
    assert [line[:12].strip() for line in err.splitlines()[:3]] == ["policy", "tuned", "context"]
    assert json.loads(run(*argv, "--kv-retention", "0.5")[1])["policy"]["kv_retention"] == 0.5


# --- mistakes ---

ONE = ["--prompt", "one.txt"]
TEXT = ["--context", "doc.txt"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (TEXT, "required: --prompt or --prompts"),
        ([*TEXT, "--cache", "doc.kv", *ONE], "--cache has a context already: leave it or --context out"),
        (["--save-cache", "new.kv", *ONE], "--save-cache writes what --context has read: add --context"),
        (["--cache", "doc.kv", "--save-cache", "new.kv", *ONE], "--save-cache writes what --context has read, and"),
        (["--cache", "doc.kv", "--policy", "full", *ONE], "--policy: what --cache names has its policy already"),
        (["--cache", "doc.kv", "--policy-file", "x", *ONE], "--policy-file: what --cache names has its policy"),
        (["--cache", "doc.kv", "--kv-dtype", "int8", *ONE], "--kv-dtype: entries of a file are in the model's dtype"),
        (["--cache", "doc.kv", "--kv-len", "20", *ONE], "--kv-len: what --cache names has its policy already"),
        (["--cache", "doc.kv", "--chat", "--system", "x", *ONE], "--system: what --cache names has its system mess"),
        (["--cache", "no.kv", *ONE], "--cache: no.kv: cannot be read (No such file or directory)"),
        (["--cache", "one.txt", *ONE], "--cache: one.txt: is no session file"),
        (["--cache", ".", *ONE], "--cache: .: cannot be read, for it is no ordinary file"),
        (["--cache", "", *ONE], "--cache takes the name of a file, not ''"),
        (["--cache", "-", *ONE], "--cache takes the name of a file, not '-'"),
        ([*TEXT, "--save-cache", "-"], "--save-cache takes the name of a file, not '-'"),
        ([*TEXT, "--save-cache", "."], "--save-cache: .: cannot be written"),
        ([*TEXT, "--save-cache", "no/such/x"], "--save-cache: no/such/x: cannot be written"),
        ([*TEXT, "--save-cache", "/dev/null"], "--save-cache: /dev/null: cannot be written, for it is no ordinary"),
        ([*TEXT, "--save-cache", "./doc.txt"], "--save-cache: ./doc.txt: is read or written by another flag, too"),
        ([*TEXT, "--save-cache", "one.txt", *ONE], "--save-cache: one.txt: is read or written by another flag, too"),
        ([*TEXT, "--save-cache", "n", "--output", "n", *ONE], "--save-cache: n: is read or written by another flag"),
        ([*TEXT, "--save-cache", "n", "--max-tokens", "3"], "--max-tokens is for an answer: add --prompt"),
        ([*TEXT, "--save-cache", "n", "--temperature", "0"], "--temperature is for an answer: add --prompt"),
        ([*TEXT, "--save-cache", "n", "--output", "o"], "--output is for an answer: add --prompt"),
        ([*TEXT, "--save-cache", "n", "--json"], "--json is for an answer: add --prompt"),
        ([*TEXT, "--report", "r.html", *ONE], "--report shows a prompt that is read as one"),
        ([*ASKED, "--json"], "--json is for one prompt on standard output"),
        ([*TEXT, "--batch-size", "2", *ONE], "--batch-size is for several prompts: add --output"),
        (["--context", "no.txt", *ONE], "--context no.txt: cannot be read"),
        (["--context", "", *ONE], "--context : cannot be read"),
        (["--context", "empty", *ONE], "--context empty: is empty"),
        (["--context", "-", "--prompt", "-"], "--context and --prompt cannot both read standard input"),
        (["--context", "long.txt", *ONE], "--context: long.txt: the prompt has "),
        ([*TEXT, "--prompt", "long.txt"], "--prompt: the prompt has 9"),
        ([*ASKED, "--prompt", "long.txt"], "prompt long.txt: the prompt has 9"),
        ([*ASKED, "--prompt", "long.txt", "--output", "o"], "prompt long.txt: the prompt has 9"),
        ([*ASKED, "--max-tokens", "8192"], "--max-tokens: prompt one.txt: max_tokens must be at most "),
        ([*TEXT, "--chat", *ONE], "--chat: "),
    ],
    ids=str,
)
def test_mistakes(run: Run, argv: list[str], named: str) -> None:
    Path("long.txt").write_text("1" * 9000)
    Path("empty").write_text("\n")
    Path("doc.kv").write_text("")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    status, out, err = run(*argv, "--quiet")
    assert (status, out) == (2, "")
    assert err.startswith("fastkv-run: error: ")
    assert len(err.splitlines()) == 1
    assert named in err
    Path("o").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
