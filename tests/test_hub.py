"""Models by hub id, from a small hub of our own: only the needed files come, once, and every failure is one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from places import ROOT

from fastkv import FastKVError
from fastkv.models.checkpoint import Checkpoint
from fastkv.models.config import ModelConfig

TINY = ROOT / "tests" / "data" / "tiny-gqa"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCH = "89abcdef0123456789abcdef0123456789abcdef"  # of revision "other"

NEEDED = {
    "config.json": (TINY / "config.json").read_bytes(),
    "generation_config.json": b'{"eos_token_id": [2, 3]}',
    "model.safetensors": (TINY / "model.safetensors").read_bytes(),
    "tokenizer_config.json": b'{"add_bos_token": false}',
    "chat_template.jinja": b"{{ messages[0].content }}",
    "added_tokens.json": b'{"<pad>": 256}',
    "special_tokens_map.json": b"{}",
    "chat_template.json": b'{"chat_template": "{{ messages[0].content }}"}',
}
NOT_NEEDED = {
    name: f"{name}, never asked for".encode()
    for name in (
        ".gitattributes",
        "README.md",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/model.safetensors",
        "original/tokenizer.model",
        "onnx/model.onnx",
        "onnx/config.json",
        "modeling_tiny.py",
        "tf_model.h5",
        "flax_model.msgpack",
        "tiny.Q4_0.gguf",
        "adapter_model.safetensors",
        "training_args.bin",
        "vocab.json",
        "merges.txt",
    )
}
SHARDED = {
    "config.json": NEEDED["config.json"],
    "model.safetensors.index.json": b"an index",
    "model-00001-of-00002.safetensors": b"one half",
    "model-00002-of-00002.safetensors": b"the other half",
    "tokenizer.json": b"a tokenizer",
    "tokenizer.model": b"its pieces",
}


class Hub:
    """What the handler below serves, and what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {
            "org/tiny": {**NEEDED, **NOT_NEEDED},
            "org/sharded": {**SHARDED, **NOT_NEEDED},
            "org/diffusion": {"model_index.json": b"{}", **NOT_NEEDED},
            "org/pickled": {"config.json": NEEDED["config.json"], **NOT_NEEDED},
        }
        self.requests: list[tuple[str, str]] = []  # method, path
        self.advice: str | None = None  # sent along with every answer
        self.broken = False  # every answer is 500
        self.cut = False  # connections close in the middle of a large file

    @property
    def fetched(self) -> list[str]:
        """The files that were fetched, in alphabetical order."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return sorted(path.split("/", 5)[5] for path in paths)


class Handler(BaseHTTPRequestHandler):
    """The few requests of the hub's interface that a download makes."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            return self.answer(500, b"out of order")
        if path.startswith("/api/models/"):
            return self.about(path.removeprefix("/api/models/").split("/"))
        organisation, name, resolve, revision, *rest = [*path.lstrip("/").split("/"), "", "", ""][:8]
        files = self.hub.repositories.get(f"{organisation}/{name}", {})
        content = files.get("/".join(rest).rstrip("/"))
        if resolve != "resolve" or content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": revision}
        return self.answer(200, content, headers)

    def about(self, parts: list[str]) -> None:
        """/api/models/ORG/NAME[/revision/REV | /tree/REV]"""
        repository = "/".join(parts[:2])
        if repository == "org/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        files = self.hub.repositories.get(repository)
        if files is None:
            unknown = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
            return self.answer(401, b"", unknown)
        commits = {"main": COMMIT, "other": BRANCH, COMMIT: COMMIT, BRANCH: BRANCH}
        commit = commits.get(parts[3] if len(parts) > 3 else "main")
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if parts[2:3] == ["tree"]:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if self.hub.advice:
            self.send_header("X-HF-Warning", self.hub.advice)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut and len(body) > 100_000:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """Where Handler answers, for the hub of the test that runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(served: str) -> Hub:
    Handler.hub = Hub()
    return Handler.hub


# The part of the command that looks for the model, with the command's own words; it does without torch, and is quick.
FIND = """
import sys
from fastkv.cli_flags import NAMED_SETTINGS
from fastkv.console.parser import guarded
from fastkv.models.hub import model_folder
def find(*argv):
    sys.exit(guarded("fastkv-run", lambda: print(model_folder(*argv)), NAMED_SETTINGS))
"""
FIND_HERE = f"{FIND}\nfind(*sys.argv[1:])"
# A process that has imported what there is to import, and becomes two for each model to find. The hub's library reads
# the environment while it is imported, so it is imported anew where the variables are others.
FINDER = f"""
import json, os
from huggingface_hub import snapshot_download
{FIND}
for line in sys.stdin:
    argv, environment, others, folder, out, err = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name in sys.modules if others and name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    find(*argv)
"""


@pytest.fixture(scope="module")
def usual(served: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that knows our hub and a cache; all that the hub's library reads while it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = tmp_path_factory.mktemp("hub") / "home"
    ours = {"HF_ENDPOINT": served, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return {**kept, **ours, **plain}


@pytest.fixture
def home(usual: dict[str, str]) -> Path:
    """The folder of the hub's library, which is empty."""
    folder = Path(usual["HF_HOME"])
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def environment(hub: Hub, home: Path, usual: dict[str, str], cache_folder: Path) -> dict[str, str]:
    return {**usual, "FASTKV_CACHE": str(cache_folder)}


@pytest.fixture
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """start(*python_arguments): Python in a process of its own, with these variables."""

    def call(*argv: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *argv], env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr
        )

    return call


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def finder(usual: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    command = [sys.executable, "-c", FINDER]
    with subprocess.Popen(command, env=usual, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        yield process
        process.stdin.close()


Ended = tuple[int, str, str]  # the exit status, and what was written to standard output and error


@pytest.fixture
def looked(finder: subprocess.Popen[str], environment: dict[str, str], tmp_path: Path) -> Callable[..., Ended]:
    """looked(model, revision, **variables): what came of FIND in a process of its own."""

    def call(*argv: str, **variables: str) -> Ended:
        written = [str(tmp_path / name) for name in ("stdout", "stderr")]
        assert finder.stdin is not None
        assert finder.stdout is not None
        given = [argv, {**environment, **variables}, bool(variables), os.getcwd(), *written]
        print(json.dumps(given), file=finder.stdin, flush=True)
        status = int(finder.stdout.readline())
        return status, *(Path(path).read_text() for path in written)  # type: ignore[return-value]

    return call


@pytest.fixture
def find(looked: Callable[..., Ended]) -> Callable[..., Path]:
    """find(model, revision, **variables): the folder of a model, which must be found."""

    def call(*argv: str, **variables: str) -> Path:
        status, out, err = looked(*argv, **variables)
        assert status == 0, err
        assert err == ""  # no progress bar where there is no terminal
        return Path(out.removesuffix("\n"))

    return call


@pytest.fixture
def complaint(looked: Callable[..., Ended]) -> Callable[..., str]:
    """complaint(model, revision, **variables): what is said of a model that is not found."""

    def call(*argv: str, **variables: str) -> str:
        status, out, err = looked(*argv, **variables)
        check(status, out, err)
        return err

    return call


def check(status: int, out: str, err: str) -> None:
    assert status == 2, err[-1000:]
    assert out == ""
    assert err.startswith("fastkv-run: error: ")
    assert len(err.splitlines()) == 1, err[-1000:]


Find = Callable[..., Path]
Complaint = Callable[..., str]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_downloaded_and_runs(start: Start) -> None:
    """All the way: the library downloads by id, loads, and generates what it does from the folder."""
    code = """
import sys
from fastkv import LLM, SamplingParams
params = SamplingParams(max_tokens=8, ignore_eos=True)
here, there = (LLM(name, device="cpu") for name in sys.argv[1:])
assert here.generate([5, 6, 7], params).token_ids == there.generate([5, 6, 7], params).token_ids
assert there.config.eos_token_ids == (2, 3)
"""
    process = start("-c", code, str(TINY), "org/tiny")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(("model", "needed"), [("org/tiny", NEEDED), ("org/sharded", SHARDED)])
def test_only_the_needed_files_come(hub: Hub, find: Find, model: str, needed: dict[str, bytes]) -> None:
    """No pickles, no code, no second copy of the weights: not fetched, not even asked about."""
    assert contents(find(model)) == needed
    assert hub.fetched == sorted(needed)
    asked = {path.rpartition("/resolve/")[2].partition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert asked == set(needed)


def test_a_model_is_fetched_once(hub: Hub, find: Find) -> None:
    first = find("org/tiny")
    hub.requests.clear()
    assert find("org/tiny") == first
    assert hub.fetched == []


def test_offline_takes_what_is_there(hub: Hub, find: Find, complaint: Complaint) -> None:
    """HF_HUB_OFFLINE: no request at all, for a model that was downloaded and for one that was not."""
    assert "offline" in complaint("org/tiny", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    folder = find("org/tiny")
    hub.requests.clear()
    assert find("org/tiny", HF_HUB_OFFLINE="1") == folder
    assert contents(folder) == NEEDED
    assert hub.requests == []


def test_a_hub_out_of_order_is_no_trouble_for_a_model_that_is_there(hub: Hub, find: Find) -> None:
    folder = find("org/tiny")
    hub.broken = True
    assert find("org/tiny") == folder


@pytest.mark.parametrize("revision", ["other", BRANCH])
def test_a_revision(hub: Hub, find: Find, revision: str) -> None:
    assert find("org/tiny", revision).name == BRANCH
    assert hub.fetched == sorted(NEEDED)


def test_an_unknown_revision(complaint: Complaint) -> None:
    said = complaint("org/tiny", "no-such-branch")
    assert "--revision" in said
    assert "no-such-branch" in said
    assert "org/tiny" in said


def test_an_unknown_model(complaint: Complaint) -> None:
    said = complaint("org/unknown")
    assert "org/unknown" in said
    assert "no such" in said


def test_a_gated_model(complaint: Complaint) -> None:
    """What to do is said: accept the licence, give a token."""
    said = complaint("org/gated")
    assert "org/gated" in said
    assert "HF_TOKEN" in said


def test_a_hub_out_of_order(hub: Hub, complaint: Complaint) -> None:
    hub.broken = True
    assert "org/tiny" in complaint("org/tiny")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "no address at all"])
def test_a_hub_that_cannot_be_reached(complaint: Complaint, endpoint: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        said = complaint("org/tiny", HF_ENDPOINT=endpoint.format(port=closed.getsockname()[1]))
    assert "org/tiny" in said


def test_a_download_that_breaks_off(hub: Hub, find: Find, complaint: Complaint) -> None:
    """After some tries it is given up, in one line; what came is no model, and the next attempt completes it."""
    hub.cut = True
    assert "org/tiny" in complaint("org/tiny")
    hub.cut = False
    complaint("org/tiny", HF_HUB_OFFLINE="1")
    assert contents(find("org/tiny")) == NEEDED


def test_what_the_hub_has_to_say_is_not_the_commands_output(hub: Hub, find: Find, complaint: Complaint) -> None:
    """The hub asks everyone without a token to get one, and its library prints that; one line is one line."""
    hub.advice = "unauthenticated; You are sending unauthenticated requests to the hub."
    complaint("org/unknown")
    find("org/tiny")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_cache_that_cannot_be_written(complaint: Complaint, tmp_path: Path, variable: str) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "org/tiny" in complaint("org/tiny", **{variable: str(tmp_path / "file")})


def test_a_folder_of_that_name_wins(hub: Hub, find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find("org/tiny") == Path("org/tiny")
    assert hub.requests == []


def what_is_lacking(folder: Path) -> str:
    """What is said of a folder that was found and is not whole; "" of a whole one."""
    try:
        ModelConfig.from_pretrained(folder)
        Checkpoint.open(folder).close()
    except FastKVError as error:
        return str(error)
    return ""


@pytest.fixture(params=["known", "unknown"])
def said_offline(request: pytest.FixtureRequest, find: Find, complaint: Complaint, home: Path) -> Complaint:
    """said_offline(model, revision): of a model in the cache that is not whole.

    The hub's library refuses it where it has kept the list of the model's files; else it gives what there is, as its
    older versions do, and what is missing is noticed when it is read.
    """

    def call(*argv: str) -> str:
        if request.param == "known":
            return complaint(*argv, HF_HUB_OFFLINE="1")
        for lists in home.glob("hub/models--*/trees"):
            shutil.rmtree(lists)
        return what_is_lacking(find(*argv, HF_HUB_OFFLINE="1"))

    return call


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_that_the_cache_has_lost(find: Find, said_offline: Complaint, file: str) -> None:
    """It is said which, and how to get it; doing that helps."""
    lost = find("org/tiny") / file
    lost.resolve().unlink()
    said = said_offline("org/tiny")
    assert all(part in said for part in (str(lost), "has lost", "--model org/tiny while"))
    assert what_is_lacking(find("org/tiny")) == ""
    assert contents(lost.parent) == NEEDED


def test_a_lost_file_of_a_revision(find: Find, said_offline: Complaint) -> None:
    lost = find("org/tiny", "other") / "config.json"
    lost.resolve().unlink()
    assert f"--model org/tiny --revision {BRANCH}" in said_offline("org/tiny", "other")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_download_that_was_broken_off(find: Find, said_offline: Complaint, file: str) -> None:
    """What is found of it offline is called incomplete."""
    folder = find("org/tiny")
    (folder / file).unlink()
    said = said_offline("org/tiny")
    assert all(part in said for part in (str(folder), "incomplete", "--model org/tiny while"))


def test_a_shard_that_did_not_come(hub: Hub, find: Find, said_offline: Complaint) -> None:
    weights = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.repositories["org/sharded"] |= {
        "config.json": NEEDED["config.json"],
        "model.safetensors.index.json": json.dumps(weights).encode(),
    }
    folder = find("org/sharded")
    (folder / "model-00001-of-00002.safetensors").unlink()
    said = said_offline("org/sharded")
    assert all(part in said for part in (str(folder), "--model org/sharded while"))


def test_a_repository_without_weights_of_this_kind(find: Find) -> None:
    said = what_is_lacking(find("org/pickled"))
    assert all(part in said for part in ("model.safetensors", "incomplete", "no safetensors weights on the hub"))


def test_a_repository_without_config(hub: Hub, find: Find) -> None:
    """Not told to be a folder, which it is not."""
    del hub.repositories["org/sharded"]["config.json"]
    said = what_is_lacking(find("org/sharded"))
    assert all(part in said for part in ("config.json", "incomplete", "or the model is not in the Hugging Face layout"))


def test_a_repository_that_is_no_model_at_all(complaint: Complaint) -> None:
    said = complaint("org/diffusion")
    assert all(part in said for part in ("org/diffusion", "config.json", "safetensors", "Hugging Face layout"))


def test_a_terminal_shows_progress(start: Start) -> None:
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = start("-c", FIND_HERE, "org/tiny", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            some = os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            break
        if not some:
            break
        shown += some
    os.close(ours)
    assert process.wait(60) == 0
    assert b"%" in shown
    assert b"\r" in shown


def test_the_command_with_a_hub_id(start: Start, tmp_path: Path) -> None:
    """The whole command: a wrong revision is a mistake like any other."""
    (tmp_path / "prompt.txt").write_text("hello")
    argv = ["-m", "fastkv", "--model", "org/tiny", "--prompt", str(tmp_path / "prompt.txt"), "--revision", "none"]
    process = start(*argv)
    out, err = process.communicate(timeout=60)
    check(process.returncode, out, err)
    assert "--revision: org/tiny" in err
