"""Loads a hostile model folder, and uses what loads: text, chat, two tokens of each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuzz.base_folders import base_folder, write
from fuzz.edits import *  # noqa: F403 (a program that shows a fault again needs them)
from fuzz.edits import Edit, Special
from fuzz.outcomes import check_complaint, require

from fastkv import LLM, FastKVError, Output, SamplingParams

PARAMS = SamplingParams(max_tokens=2)


@dataclass(frozen=True)
class Folder:
    """A valid folder and what is changed; then what is asked of the model. weights: as of LLM."""

    family: str
    kind: str
    edits: tuple[Edit, ...]
    text: str = "hello"
    messages: tuple[dict[str, Any], ...] = ({"role": "user", "content": "hello"},)
    weights: str | None = None

    @property
    def place(self) -> str:
        """What is changed, for people."""
        return ", ".join(sorted({edit.file for edit in self.edits}))

    def smaller(self) -> Iterator[Folder]:
        for left_out in range(len(self.edits)):
            yield replace(self, edits=self.edits[:left_out] + self.edits[left_out + 1 :])
        plain = Folder(self.family, self.kind, self.edits)
        if plain != self:
            yield plain
            yield replace(self, text=plain.text)
            yield replace(self, messages=plain.messages)


def write_folder(example: Folder, path: Path) -> None:
    files = dict(base_folder(example.family, example.kind))
    for edit in example.edits:
        edit.apply(files)
    write(files, path)
    for edit in example.edits:
        if isinstance(edit, Special):
            edit.finish(path)


def run_folder(example: Folder) -> None:
    """Raises FastKVError for the first thing that is refused."""
    path = Path(tempfile.mkdtemp())
    try:
        write_folder(example, path)
        llm = LLM(path, device="cpu", weights=example.weights)
        refusals = [
            _refused(lambda: _check(llm, llm.generate(example.text, PARAMS))),
            _refused(lambda: _check(llm, llm.generate(llm.chat(list(example.messages)), PARAMS))),
        ]
        for refusal in filter(None, refusals):
            raise refusal
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _refused(work: Callable[[], None]) -> FastKVError | None:
    try:
        work()
    except FastKVError as error:
        check_complaint(str(error))
        return error
    return None


def _check(llm: LLM, output: Output) -> None:
    require(1 <= len(output.token_ids) <= 2, "one or two tokens")
    require(all(0 <= token < llm.config.vocab_size for token in output.token_ids), "tokens of the vocabulary")
    output.text.encode("utf-8")
