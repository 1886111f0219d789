"""Runs `fastkv-run` in this process with hostile flags and files, and holds it to what it promises of every ending."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fuzz import watchdog
from fuzz.base_folders import base_folder, write
from fuzz.edits import *  # noqa: F403 (a program that shows a fault again needs them)
from fuzz.edits import Bytes
from fuzz.outcomes import require

from fastkv import LLM, FastKVError, cli
from fastkv.console import load
from fastkv.console.load import load_model

ERROR = "fastkv-run: error: "
OUTPUT = "out.jsonl"
# What a loaded model depends on, and the values with which one is loaded once for all.
_USUAL = {
    "dtype": ("auto", "float32"),
    "weights": (None,),
    "device": ("auto", "cpu"),
    "revision": (None,),
    "attention": ("auto",),
}


@dataclass(frozen=True)
class Command:
    """The arguments, of which files are names in a folder of its own, and what is in that folder besides a model."""

    argv: tuple[str, ...]
    files: dict[str, Bytes] = field(default_factory=dict)
    stdin: Bytes = field(default_factory=Bytes)

    def smaller(self) -> Iterator[Command]:
        for name in self.files:
            yield replace(self, files={other: content for other, content in self.files.items() if other != name})
        for length in (2, 1):
            for start in range(len(self.argv) - length + 1):
                yield replace(self, argv=self.argv[:start] + self.argv[start + length :])


def run_command(example: Command) -> None:
    """Raises FastKVError where the command says that something is wrong, so that it counts as refused."""
    folder, before = Path(tempfile.mkdtemp()), Path.cwd()
    try:
        write({name: content.whole() for name, content in example.files.items()}, folder)
        (folder / "a-folder").mkdir()
        (folder / "a-link").symlink_to("nowhere")
        (folder / "model").symlink_to(_model_folder())
        os.chdir(folder)
        status, out, err = _main(example)
        _check_ending(example, status, out, err)
        if status:
            raise FastKVError(err.removeprefix(ERROR).rstrip("\n"))
        if OUTPUT in example.argv and not {"--help", "--version", "-h"} & set(example.argv):
            _check_resumes(example, folder / OUTPUT)
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _main(example: Command) -> tuple[Any, bytes, str]:
    watchdog.taken()
    watchdog.fresh_streams()
    stdin = io.TextIOWrapper(io.BytesIO(example.stdin.whole()))
    with patch.object(load, "load_model", _loaded), patch.object(sys, "stdin", stdin):
        try:
            status: Any = cli.main(list(example.argv))
        except SystemExit as left:  # --help and --version
            status = left.code
    out, err = watchdog.taken()
    watchdog.fresh_streams()
    return status, out, err.decode("utf-8", "surrogateescape")


def _check_ending(example: Command, status: Any, out: bytes, err: str) -> None:
    require(status in (0, 1, 2), f"exit status 0, 1 or 2, not {status!r}", err)
    require("Traceback" not in err, "no traceback", err)
    try:
        out.decode("utf-8")
    except UnicodeDecodeError:
        require(False, "standard output is UTF-8", out)
    lines = err.splitlines()
    require(all(line.isprintable() for line in lines), "standard error is printable lines", err)
    if status == 0:
        require(not any(line.startswith(ERROR) for line in lines), "no complaint with status 0", err)
        return
    require(len(lines) == 1 and err.endswith("\n"), "one line of complaint", err)
    require(err.startswith(ERROR), "a complaint names the command", err)
    if status == 2:
        require(out == b"", "nothing on standard output where the user made a mistake", out)


def _check_resumes(example: Command, path: Path) -> None:
    """Every line is a record; the same command again has nothing to do, and changes nothing."""
    if not path.exists():
        return
    content = path.read_bytes()
    for line in content.splitlines():
        require({"id", "text"} <= set(json.loads(line)), "records have an id and a text", line)
    status, _, err = _main(example)
    require(status == 0, "the same command again succeeds", err)
    require(path.read_bytes() == content, "the same command again leaves the answers as they are")


@cache
def _model_folder() -> Path:
    """Outside the folders of examples; it lasts as long as the process."""
    return write(base_folder("LlamaForCausalLM", "json"), Path(tempfile.mkdtemp()))


@cache
def _usual_llm() -> LLM:
    return LLM(_model_folder(), device="cpu")


def _loaded(model: str, threads: int | None = None, **settings: Any) -> LLM:
    """The usual model where nothing else is asked for; a real one, which is never compiled, where something is."""
    settings["compile"] = False
    if model == "model" and all(settings[name] in usual for name, usual in _USUAL.items()):
        llm = _usual_llm()
        llm.policy = settings["policy"]
        return llm
    return load_model(model, threads, **settings)
