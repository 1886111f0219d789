"""The prompts that a command is given: text files, or a JSONL file of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv.console.jsonl import read_objects
from fastkv.errors import FastKVError
from fastkv.storage import is_endless

HOLDS = "prompt and, if wanted, id"  # an object of a JSONL file of prompts


@dataclass(frozen=True)
class Job:
    """A prompt and the name that its record has."""

    id: str
    prompt: str

    @property
    def digest(self) -> str:
        """Tells whether a record of that name is of this very prompt."""
        return digest(self.prompt)


def digest(text: str) -> str:
    """Tells whether it is this very text: the beginning of the SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_prompt(name: str, flag: str = "--prompt", *, whole: bool = False) -> str:
    """The text of a prompt file ("-": standard input), verbatim but for a byte-order mark and one last newline.

    flag: what named it, for the complaints. whole: with that newline, for a text that another one follows.
    Raises FastKVError for a file that is missing, empty, binary or not UTF-8.
    """
    source = "standard input" if name == "-" else name
    if name == "-" and sys.stdin is None:
        raise FastKVError(f"{flag} {source}: is closed")
    if name != "-" and is_endless(name):
        raise FastKVError(f"{flag} {source}: cannot be read, for it is a device; - reads standard input")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise FastKVError(f"{flag} {source}: cannot be read ({error.strerror})") from None
    return text_of(data, f"{flag} {source}", whole)


def text_of(data: bytes, source: str, whole: bool = False) -> str:
    """The text of a file's bytes, verbatim but for a byte-order mark and one last newline. source: what it is named.

    whole: with that newline, too. Raises FastKVError for bytes that are empty, binary or not UTF-8.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FastKVError(f"{source}: is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise FastKVError(f"{source}: is a binary file; give a text file in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastKVError(f"{source}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    verbatim, text = text, without_last_newline(text)
    if not text:
        raise FastKVError(f"{source}: is empty")
    return verbatim if whole else text


def without_last_newline(text: str) -> str:
    """A text without the one newline at its end that editors put there."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def read_jobs(path: str) -> list[Job]:
    """The prompts of a JSONL file: objects with `prompt`, a text, and, if wanted, `id` (else the number of the line).

    Raises FastKVError, naming the line, for whatever is not that.
    """
    entries, _ = read_objects(Path(path), "prompts", HOLDS)
    jobs = [job_of(where, entry) for where, entry in entries]
    check_names(jobs, "prompts")
    return jobs


def check_names(jobs: Sequence[Job], setting: str) -> None:
    """FastKVError for two prompts of one name: their records could not be told apart."""
    names: set[str] = set()
    for job in jobs:
        if job.id in names:
            raise FastKVError(f"there are two prompts of the name {job.id}; give each its own", setting=setting)
        names.add(job.id)


def is_broken(text: str) -> bool:
    """Whether a text holds halves of surrogate pairs: Python makes them of bytes that are no UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def check_texts(args: argparse.Namespace, *flags: str) -> None:
    """FastKVError for a flag that holds a text, texts or an object of texts, and is not UTF-8."""
    for flag in flags:
        value = getattr(args, flag)
        texts = value if isinstance(value, list) else [json.dumps(value, ensure_ascii=False)]
        if any(map(is_broken, texts)):
            raise FastKVError("is not UTF-8", setting=flag)


def job_of(where: str, entry: dict[str, Any]) -> Job:
    """The prompt of an object; where: `FILE, line N`. Raises FastKVError, naming it, for anything else."""
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise FastKVError(f"{where}: needs a text as prompt", setting="prompts")
    unknown = sorted(set(entry) - {"prompt", "id"})
    if unknown:
        raise FastKVError(f"{where}: {unknown[0]} is neither prompt nor id", setting="prompts")
    name = entry.get("id", int(where.rsplit(" ", 1)[1]))
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise FastKVError(f"{where}: id must be a text or a whole number, not {json.dumps(name)}", setting="prompts")
    if is_broken(f"{name}{entry['prompt']}"):
        raise FastKVError(f"{where}: holds half of a surrogate pair, which is no text", setting="prompts")
    return Job(str(name), entry["prompt"])
