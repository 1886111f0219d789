"""Files of a model folder that are no files: a pipe used to hang for ever, a link to a device to take all memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from places import ROOT

from fastkv import LLM, FastKVError
from fastkv.cli import main

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
