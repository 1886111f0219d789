"""fastkv-chat: what goes to stdout and what to stderr, its commands, what is refused, and a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM, FullKV, SamplingParams, SnapKV
from fastkv.cache.pool import KVPool
from fastkv.console.talk import command as chat
from fastkv.console.talk.commands import COMMANDS
from fastkv.console.talk.flags import NAMED_SETTINGS, build_parser
from fastkv.engine import decode_batch
from fastkv.engine.session import DEFAULT_POLICY

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ mark | default('assistant') }}: {% endif %}"
)
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-tokens", "4", "--ignore-eos")
Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture(scope="module")
def folder(archive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template."""
    copy = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(archive_folder, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", device="cpu")


@pytest.fixture
def run(
    folder: Path, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """run(input, *flags): exit status, stdout, and the lines of stderr, in a folder of its own; one loaded model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat, "load_by_flags", lambda args, policy: llm)

    def call(said: str | bytes, *flags: str) -> tuple[int, str, list[str]]:
        data = said.encode() if isinstance(said, str) else said
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status = chat.main(["--model", str(folder), *FLAGS, *flags])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


def ended(text: str) -> str:
    """An answer as it is printed."""
    return text if text.endswith("\n") else text + "\n"


# --- from a pipe ---


def test_each_line_is_a_message_and_each_answer_that_of_a_session(run: Run, llm: LLM) -> None:
    session = llm.session(system="Be short.")
    answers = [session.chat(each, PARAMS).text for each in ("hello", "and\nthen?", "é", "last")]
    said = "\ufeffhello\r\n\n  \nand\\\nthen?\né\nlast\\"
    status, out, err = run(said, "--system", "Be short.")
    assert (status, out) == (0, "".join(map(ended, answers)))
    assert err[0].startswith("fastkv-chat: ")
    assert err[0].endswith(f"model on cpu in float32, policy {DEFAULT_POLICY.name}:kv_retention=0.2")
    assert err[1:] == ["[cut after 4 tokens: --max-tokens, or the end of the model's context]"] * 4
    assert run(said, "--system", "Be short.", "--quiet") == (0, out, [])
    assert run("") == (0, "", [err[0]])


def test_a_slash_is_sent_after_a_space(run: Run, llm: LLM) -> None:
    assert run(" /stats", "--quiet") == (0, ended(llm.session().chat(" /stats", PARAMS).text), [])


def test_flags_reach_the_answers(run: Run, llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=2.0, seed=5, ignore_eos=True)
    expected = llm.session(SnapKV(kv_len=16)).chat("hello", params, mark="assistant!").text
    given = ("--max-tokens", "6", "--temperature", "2", "--seed", "5", "--chat-arg", "mark=assistant!")
    status, out, err = run("hello", *given, "--policy", "snapkv", "--kv-len", "16")
    assert (status, out) == (0, ended(expected))
    assert err[0].endswith("policy snapkv:kv_len=16")


def test_a_setting_alone_is_one_of_the_policy_of_sessions(run: Run) -> None:
    assert run("", "--kv-retention", "0.3")[2][0].endswith(f"policy {DEFAULT_POLICY.name}:kv_retention=0.3")


# --- commands ---


def test_a_file_goes_along_once_and_its_turn_is_compressed(run: Run, llm: LLM) -> None:
    document = "The calm owl keeps the code 1234 of the mill. " * 8
    Path("doc.txt").write_text(document + "\n")
    session = llm.session(SnapKV(kv_len=24))
    answers = [session.chat("hello", PARAMS).text]
    answers.append(session.chat(f"{document}\n\nWhat is the code?", PARAMS, compress=True).text)
    entries = f"{session.kv_entries:,}"
    answers.append(session.chat("Sure?", PARAMS).text)
    said = "hello\n/file doc.txt\n/file nope.txt\nWhat is the code?\n/stats\nSure?"
    status, out, err = run(said, "--policy", "snapkv", "--kv-len", "24")
    assert (status, out) == (2, "".join(map(ended, answers)))
    assert f"doc.txt: {len(document)} characters go along with the next message" in err
    assert any(re.match(rf"KV kept +{entries} of .* entries \(", line) for line in err)


def test_a_file_can_be_left_out_again(run: Run, llm: LLM) -> None:
    Path("doc.txt").write_text("words")
    status, out, err = run("/file doc.txt\n/undo\nhello", "--quiet")
    assert (status, out) == (0, ended(llm.session().chat("hello", PARAMS).text))
    assert err[1] == "doc.txt: is left out again"


def test_undo_takes_the_last_message_back(run: Run, llm: LLM) -> None:
    session = llm.session()
    answers = [session.chat("one", PARAMS).text, session.fork().chat("two", PARAMS).text]
    answers.append(session.chat("three", PARAMS).text)
    status, out, err = run("one\ntwo\n/undo\nthree\n/undo\n/undo\n/undo\n/stats", "--quiet")
    assert (status, out) == (2, "".join(map(ended, answers)))
    assert err[:4] == [
        "taken back: 'two' and its answer",
        "taken back: 'three' and its answer",
        "taken back: 'one' and its answer",
        "fastkv-chat: error: there is no message to take back",
    ]
    assert err[4].split() == ["tokens", "0", "of", "the", "8,192", "that", "the", "model", "takes"]


def test_policy_shows_what_it_takes_and_holds_for_what_is_read_next(run: Run, llm: LLM) -> None:
    shown = run("/policy")[2][-1].removeprefix("policy ")
    assert run(f"/policy {shown}")[2][-1] == f"policy {shown}"
    Path("doc.txt").write_text("some words " * 40)
    session = llm.session(FullKV())
    answers = [session.chat("hello", PARAMS).text]
    session.policy = SnapKV(kv_len=20)
    answers.append(session.chat(f"{'some words ' * 40}\n\nWhy?", PARAMS, compress=True).text)
    status, out, err = run("hello\n/policy snapkv:kv_len=20\n/file doc.txt\nWhy?", "--policy", "full")
    assert (status, out) == (0, "".join(map(ended, answers)))
    assert err[2].startswith("policy snapkv:")
    assert err[2].endswith(" from now on; what was read before stays as it was kept")


def test_it_says_where_a_policy_cannot_choose_any_more(run: Run) -> None:
    Path("doc.txt").write_text("some words " * 40)
    _, _, err = run("hello\n/file doc.txt\nWhy?\n", "--policy", "adakv", "--quiet")
    assert "[policy adakv chooses only as a conversation begins: this is kept whole]" in err


def test_a_saved_conversation_goes_on_anywhere(run: Run, llm: LLM) -> None:
    """With its policy, unless another one is named; what was said before can no longer be taken back."""
    Path("doc.txt").write_text("some words " * 40)
    session = llm.session(SnapKV(kv_len=20), system="Be short.")
    answers = [session.chat(f"{'some words ' * 40}\n\nWhy?", PARAMS, compress=True).text]
    answers += [session.chat(each, PARAMS).text for each in ("And?", "So?")]
    begun = run("/file doc.txt\nWhy?\n/save it", "--system", "Be short.", "--policy", "snapkv", "--kv-len", "20")
    assert begun[:2] == (0, ended(answers[0]))
    assert re.fullmatch(r"it: 1 message, \d+ tokens", begun[2][-1])
    status, out, err = run("And?\n/undo\n/undo\nAnd?\nSo?", "--cache", "it")
    assert (status, out) == (2, "".join(map(ended, [answers[1], *answers[1:]])))
    assert re.search(r"policy snapkv:kv_len=20; 1 message, \d+ tokens$", err[0])
    assert "error: what was loaded cannot be taken back, only what was said since" in "".join(err)
    status, out, err = run("hello\n/load it\nAnd?\nSo?", "--quiet")
    assert (status, out) == (0, "".join(map(ended, [llm.session().chat("hello", PARAMS).text, *answers[1:]])))
    assert re.fullmatch(r"it: 1 message, \d+ tokens, policy snapkv:kv_len=20", err[0])
    assert run("", "--cache", "it", "--policy", "full")[2][0].endswith("policy full; " + begun[2][-1][4:])


def test_a_document_that_was_read_for_a_chat_begins_one(run: Run, llm: LLM) -> None:
    """As `fastkv-run --chat --context FILE --save-cache FILE` leaves it: the first message is the rest of its own."""
    session = llm.session(SnapKV(kv_len=20))
    session.chat_add("some words " * 40 + "\n\n")
    session.save("read")
    answers = [session.chat(each, PARAMS).text for each in ("Why?", "And?")]
    status, out, err = run("Why?\nAnd?", "--cache", "read", "--quiet")
    assert (status, out, err) == (0, "".join(map(ended, answers)), [])


def test_what_cannot_be_loaded_leaves_the_conversation(run: Run, llm: LLM) -> None:
    session = llm.session()
    answers = [session.chat(each, PARAMS).text for each in ("hello", "Why?")]
    document = llm.session()
    document.add("The calm owl keeps the code.")
    document.save("document")
    Path("other").write_text("words")
    status, out, err = run("hello\n/load other\n/load document\n/save no/where\nWhy?", "--quiet")
    assert (status, out, len(err)) == (2, "".join(map(ended, answers)), 3)
    assert err[0].startswith("fastkv-chat: error: other: ")
    assert err[1].startswith("fastkv-chat: error: document: holds a text and no conversation; ")
    assert err[2].startswith("fastkv-chat: error: no/where: ")
    status, out, err = run("hello", "--cache", "other")
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("fastkv-chat: error: --cache: other: ")


def test_help_tells_every_command_and_so_does_the_page(run: Run) -> None:
    _, out, err = run("/help", "--quiet")
    assert out == ""
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        line = f"{name} {command.argument}".rstrip()
        assert sum(told.startswith(f"{line} ") for told in err) == 1
        assert f"| `{line}` |" in page
    assert "backslash" in err[-3] + err[-2]


def test_exit_leaves(run: Run) -> None:
    assert run("/exit\nhello\n", "--quiet") == (0, "", [])


WRONG_LINES: list[tuple[str | bytes, str]] = [
    ("/nope", "no command '/nope'; /help lists them."),
    ("/", "no command '/'"),
    ("/FILE a", "no command '/FILE'"),
    ("/nope\\", "no command '/nope"),
    ("/usr/bin is a folder", "no command '/usr/bin'"),
    ("/undo now", "/undo takes nothing after it, not 'now'"),
    ("/undo", "there is no message to take back"),
    ("/file", "/file PATH: PATH is missing"),
    ("/load   ", "/load FILE: FILE is missing"),
    ("/file none.txt", "none.txt: cannot be read (No such file or directory)"),
    ("/file .", ".: cannot be read, for it is no ordinary file"),
    ("/file /dev/zero", "/dev/zero: cannot be read, for it is no ordinary file"),
    ("/file empty", "empty: is empty"),
    ("/file binary", "binary: is a binary file"),
    ("/file latin", "latin: is not UTF-8 (byte 3)"),
    ("/file ~nobody-of-that-name/x", "~nobody-of-that-name/x: cannot be read"),
    ("/file a\0b", "no file can be named 'a\\x00b'"),
    (f"/file {'x' * 5000}", "File name too long"),
    ("/policy kvsnap", "policy must be one of fastkv, "),
    ("/policy snapkv:kv_len", "must be NAME or NAME:setting=value"),
    ("/policy snapkv:kv_len=-1", "kv_len must be "),
    ("/policy full:kv_len=9", "--kv-len is no setting of --policy full"),
    ("/policy fastkv:tsp_layer=99", "tsp_layer must be "),
    (b"caf\xe9", "a line of the message is not UTF-8; it was left out"),
    ("words " * 9000, "the prompt "),
]


def test_what_cannot_be_followed_is_one_line_and_the_conversation_goes_on(run: Run, llm: LLM) -> None:
    for name, data in (("empty", b""), ("binary", b"a\0b"), ("latin", b"caf\xe9")):
        Path(name).write_bytes(data)
    lines = [line.encode() if isinstance(line, str) else line for line, _ in WRONG_LINES]
    status, out, err = run(b"\n".join([*lines, b"hello"]), "--quiet")
    assert (status, out) == (2, ended(llm.session().chat("hello", PARAMS).text))
    for told, (_, complaint) in zip(err, WRONG_LINES, strict=True):
        assert told.startswith("fastkv-chat: error: ")
        assert complaint in told


def test_a_turn_that_does_not_fit_loses_nothing(run: Run, llm: LLM) -> None:
    """Neither the conversation nor the file that was to go along."""
    Path("doc.txt").write_text("words")
    session = llm.session(SnapKV())
    answers = [session.chat("hello", PARAMS).text, session.chat("words\n\nWhy?", PARAMS, compress=True).text]
    status, out, err = run(f"hello\n/file doc.txt\n{'words ' * 9000}\nWhy?", "--quiet", "--policy", "snapkv")
    assert (status, out, len(err)) == (2, "".join(map(ended, answers)), 2)


# --- what is refused before anything is said ---


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--policy", "kvsnap"], "--policy: policy must be one of"),
        (["--policy", "fastkv", "--tsp-layer", "99"], "--tsp-layer: tsp_layer must be "),
        (["--reach", "1"], "--reach is no setting of --policy compactor"),
        (["--policy", "full", "--kv-len", "9"], "--kv-len is no setting of --policy full"),
        (["--policy", "full", "--policy-file", "x"], "--policy-file names a policy already"),
        (["--policy-file", "none.json"], "--policy-file: none.json: cannot be read"),
        (["--policy-file", ""], "--policy-file takes the name of a file"),
        (["--cache", "-"], "--cache takes the name of a file, not '-'"),
        (["--cache", "x", "--system", "y"], "--system begins a conversation, and --cache goes on with one"),
        (["--kv-retention", "2"], "--kv-retention: "),
        (["--temperature", "-1"], "--temperature: "),
        (["--threads", "0"], "--threads: "),
        (["--stop", ""], "--stop: "),
        (["--stop-token", "no such"], "--stop-token: "),
        (["--chat-arg", "x"], "--chat-arg: is KEY=VALUE"),
        (["--chat-arg", "nothing=1"], "--chat-arg: "),
        (["--system", "\udce9"], "--system: is not UTF-8"),
    ],
    ids=lambda value: " ".join(value)[:30].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_flags_that_are_no_use(run: Run, flags: list[str], complaint: str) -> None:
    status, out, err = run("hello", *flags)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"fastkv-chat: error: {complaint}")


def test_a_model_without_a_template_is_refused_before_its_weights_are_read(
    archive_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "load_by_flags", lambda *_: pytest.fail("loaded"))
    status, out, err = run("hello", "--model", str(archive_folder))
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].endswith("no chat template (chat_template.jinja), so no chat; fastkv-run continues texts")


def test_a_closed_standard_input_is_told(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdin", None)
        assert chat.main(["--model", str(folder)]) == 2
    assert capsys.readouterr().err == "fastkv-chat: error: standard input is closed: nobody can say anything\n"


def test_every_named_setting_is_a_flag() -> None:
    flags = {action.dest for action in build_parser()._actions}
    assert flags >= NAMED_SETTINGS


def test_help_and_mistakes_import_no_torch() -> None:
    code = (
        "import sys\nfrom fastkv.console.talk.command import main\n"
        "assert main(['--model', 'x', '--cache', '']) == 2\nassert 'torch' not in sys.modules\nmain(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    assert "--cache FILE" in done.stdout


# --- Ctrl-C ---


class Typed:
    """In place of a terminal: lines, of which an exception is raised."""

    on_terminal = True

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)

    def line(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


PLACES = {
    "begin": (KVPool, "take"),
    "prefill": (decode_batch, "prefill"),
    "first token": (decode_batch.DecodeBatch, "read"),
    "step": (decode_batch.DecodeBatch, "_step"),
}


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Ctrl-C at one of PLACES, once."""

    def prepare(at: str) -> None:
        place, name = PLACES[at]
        real, left = getattr(place, name), [1]

        def fake(*args: Any, **named: Any) -> Any:
            if left:
                left.pop()
                signal.raise_signal(signal.SIGINT)
            return real(*args, **named)

        monkeypatch.setattr(place, name, fake)

    return prepare


@pytest.mark.parametrize("at", PLACES)
def test_ctrl_c_on_a_terminal_stops_the_answer_alone(
    run: Run, llm: LLM, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[[str], None], at: str
) -> None:
    """Until the first token it takes the message back; later the session has the answer so far."""
    typed = Typed(KeyboardInterrupt, "hello", "Why?", "/stats")
    monkeypatch.setattr(chat, "lines_of_stdin", lambda commands: typed)
    session, expected = llm.session(), ""
    if at == "step":
        stream = llm.stream(session.chat_turn("hello"), PARAMS)
        expected = ended("".join(next(stream).text for _ in range(2)))
        stream.close()
    expected += ended(session.chat("Why?", PARAMS).text)
    interrupted(at)
    status, out, err = run("", "--quiet")
    assert (status, out) == (0, expected)
    told = "[stopped; the conversation has" if at == "step" else "[nothing was answered, and the message is"
    assert sum(line.startswith(told) for line in err) == 1
    assert f"{len(session.ids)} of the 8,192" in err[-5]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("at", ["prefill", "step"])
def test_ctrl_c_ends_a_conversation_from_a_pipe(run: Run, interrupted: Callable[[str], None], at: str) -> None:
    interrupted(at)
    status, _, err = run("hello\nWhy?\n", "--quiet")
    assert (status, err) == (130, [])


# --- a real terminal ---


class Terminal:
    """The command on a pseudo-terminal, as a person sees it."""

    def __init__(self, folder: Path, editor: bool) -> None:
        lines = ["import sys", *([] if editor else ["sys.modules['prompt_toolkit'] = None"])]
        lines += ["from fastkv.console.talk.command import main", "sys.exit(main())"]
        flags = ["--model", str(folder), "--device", "cpu", "--ignore-eos", "--max-tokens", "4000"]
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines), *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env=environment,
        )
        os.close(theirs)
        self._seen = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was written up to and with a match of `pattern`."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self._seen, re.DOTALL)) is None:
            ready, _, _ = select.select([self._ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._seen!r}"
            data = b""
            with contextlib.suppress(OSError):  # the other end was closed
                data = os.read(self._ours, 4096)
            assert data, f"no {pattern!r} in {self._seen!r}"
            self._seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode("utf-8", "replace"))
        seen, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return seen

    def type(self, keys: str, until: str | None = None) -> None:
        """Type keys; until: once more, as a person would, as long as nothing that matches this is written."""
        os.write(self._ours, keys.encode())
        for _ in range(10 if until else 0):
            with contextlib.suppress(AssertionError):
                self.wait_for(until or "", 5)
                return
            os.write(self._ours, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(params=[False, True], ids=["plain", "prompt_toolkit"])
def terminal(request: pytest.FixtureRequest, folder: Path) -> Iterator[Terminal]:
    if request.param and importlib.util.find_spec("prompt_toolkit") is None:
        pytest.skip("prompt_toolkit is not installed")
    terminal = Terminal(folder, request.param)
    yield terminal
    terminal.close()


def test_on_a_terminal(terminal: Terminal) -> None:
    """Typing, going back in what was typed, Ctrl-C during an answer and at the prompt, and Ctrl-D."""
    terminal.wait_for("policy .*/help lists the commands.*>")
    terminal.type("hello there\r")
    terminal.wait_for(r"hello there\s+\S+")
    time.sleep(0.05)
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped; the conversation has the answer so far\].*>")
    terminal.type("not to be sent")
    terminal.wait_for("not to be sent")
    terminal.type("\x03", until=">")
    terminal.type("/stats\r")
    terminal.wait_for(r"first token .*decode +[\d,]+ tokens.*>")
    terminal.type("\x1b[A\x7f\x7f\x7f\x7f\x7fundo\r")  # "/stats" again, and "/undo" made of it
    terminal.wait_for("taken back: 'hello there' and its answer.*>")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
