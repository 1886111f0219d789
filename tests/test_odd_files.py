"""What is named as a file and is none: a pipe used to hang for ever, a link to a device to take all memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM, FastKVError
from fastkv.cache.head_table import read_table
from fastkv.cache.layer_map import read_map
from fastkv.cli import main
from fastkv.console.files import check_readable, read_json
from fastkv.console.policy_file import read_policy_file
from fastkv.console.prompt import read_prompt
from fastkv.console.talk.conversation import Conversation
from fastkv.engine.session_file import read_session

MODEL = ROOT / "examples/archive/model"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in MODEL.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_ordinary_file_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    put(folder / name, kind)
    with pytest.raises(FastKVError, match=name):
        LLM(folder, device="cpu")
    prompt = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    prompt.write_text("hello")
    assert main(["--model", str(folder), "--prompt", str(prompt)]) == 2  # which looks for remembered settings first
    assert name in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_template_that_is_no_ordinary_file_is_refused_in_a_chat(folder: Path, kind: str) -> None:
    put(folder / "chat_template.jinja", kind)
    llm = LLM(folder, device="cpu")
    with pytest.raises(FastKVError, match=r"chat_template\.jinja"):
        llm.chat([{"role": "user", "content": "hello"}])


# Whatever reads a file that a user names, but for texts.
READERS: dict[str, Callable[[Path], Any]] = {
    "head scores": read_table,
    "shared layers": read_map,
    "policy file": read_policy_file,
    "saved session": lambda path: read_session(path, None),  # type: ignore[arg-type]  # not looked at before the file
    "--cache": lambda path: check_readable(path, "cache"),
    "LongBench's tables": lambda path: read_json(path, "longbench", "entries"),
    "/file of a chat": lambda path: Conversation(None, None, None, {}, False).read_file(path),  # type: ignore[arg-type]
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("reader", READERS)
def test_a_user_s_file_is_an_ordinary_one(tmp_path: Path, reader: str, kind: str) -> None:
    put(tmp_path / "named", kind)
    with pytest.raises(FastKVError, match="named: cannot be read, for it is no ordinary file"):
        READERS[reader](tmp_path / "named")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero on this system")
@pytest.mark.parametrize("flag", ["--prompt", "--prompts", "--context"])
def test_a_text_is_no_device(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "none", flag, "/dev/zero", *(["--prompt", "x"] if flag == "--context" else [])]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastkv-run: error: {flag}")
    assert "/dev/zero: cannot be read, for it is a device" in err


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd on this system")
def test_a_text_may_come_from_a_pipe() -> None:
    """As a shell's <(command) makes one."""
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe\n")
    os.close(writer)
    assert read_prompt(f"/dev/fd/{reader}") == "from a pipe"
    os.close(reader)
