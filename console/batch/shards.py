"""The input of fastkv-batch, cut into shards: contiguous lines whose records become one file. Knows no model.

The file is read line by line, so it may be larger than memory, and each worker reads the lines of its own shards.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkv.console.files import check_readable
from fastkv.console.jsonl import object_of
from fastkv.console.prompt import HOLDS, Job, job_of
from fastkv.errors import FastKVError

_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Shard:
    """Lines of the input that follow one another, and are answered together.

    number: of the shard, from 0. line: the number of its first line, from 1. offset, size: its bytes in the file.
    records: its lines that are not blank. checksum: of its bytes. repeated: lines whose id an earlier line has.
    """

    number: int
    line: int
    offset: int
    size: int
    records: int
    checksum: str
    repeated: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Of its file in the output folder: sorted by name, the files are in the order of the input."""
        return f"shard-{self.number:06d}.jsonl"

    @property
    def told(self) -> str:
        return f"{self.name} (line {self.line} of the prompts and what follows)"


@dataclass(frozen=True)
class Prompts:
    """The input: how many records it has, a checksum of all of it, and its shards."""

    path: Path
    records: int
    checksum: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Line:
    """A line of the input. job: None for one that is no prompt; `wrong` then says why."""

    number: int
    id: str
    job: Job | None
    wrong: str | None = None


@dataclass
class _Begun:
    """A shard that still grows."""

    line: int
    offset: int
    size: int = 0
    records: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    repeated: list[int] = field(default_factory=list)


def read_prompts(path: Path, shard_size: int) -> Prompts:
    """Cut the file into shards of `shard_size` records, the last one of what is left.

    A line that is no prompt is a record like others. Raises FastKVError for a file that cannot be read, one without
    records, and one that is UTF-16.
    """
    check_readable(path, "prompts")
    shards: list[Shard] = []
    names: set[str] = set()
    whole = hashlib.sha256()
    current: _Begun | None = None
    offset = 0
    for number, raw in _lines(path):
        whole.update(raw)
        if current is None:
            current = _Begun(number, offset)
        offset += len(raw)
        current.size += len(raw)
        current.digest.update(raw)
        line = parsed(raw, number)
        if line is None:
            continue
        current.records += 1
        if line.job is not None:
            if line.id in names:
                current.repeated.append(number)
            names.add(line.id)
        if current.records == shard_size:
            shards.append(_finished(len(shards), current))
            current = None
    if current is not None and current.records:
        shards.append(_finished(len(shards), current))
    if not shards:
        raise FastKVError(f"{path}: has no lines; write one object with {HOLDS} a line", setting="prompts")
    return Prompts(path, sum(shard.records for shard in shards), whole.hexdigest()[:16], tuple(shards))


def read_shard(path: Path, shard: Shard) -> list[Line]:
    """Its records. Raises FastKVError where the file is not there, or no longer what it was cut from."""
    try:
        with path.open("rb") as file:
            file.seek(shard.offset)
            data = file.read(shard.size)
    except OSError as error:
        raise FastKVError(
            f"{path}: cannot be read by a worker ({error.strerror}); the file must have this name on every machine",
            setting="prompts",
        ) from None
    if hashlib.sha256(data).hexdigest()[:16] != shard.checksum:
        raise FastKVError(f"{path}: has changed since the command began; start it again", setting="prompts")
    lines = [parsed(raw, number) for number, raw in enumerate(io.BytesIO(data), shard.line)]
    return [_unrepeated(line, shard) for line in lines if line is not None]


def parsed(raw: bytes, number: int) -> Line | None:
    """What stands in a line; None where it is blank."""
    where = f"line {number}"
    raw = raw.removeprefix(_BOM) if number == 1 else raw
    if not raw.decode(errors="replace").strip():
        return None
    entry: dict[str, Any] = {}
    try:
        entry = object_of(where, _decoded(raw, where), "prompts", HOLDS)
        job = job_of(where, entry)
    except FastKVError as error:
        return Line(number, _name(entry, number), None, str(error))
    return Line(number, job.id, job)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1 and raw.startswith(_UTF16):
                    raise FastKVError(f"{path}: is UTF-16; save it as UTF-8", setting="prompts")
                yield number, raw
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})", setting="prompts") from None


def _finished(number: int, begun: _Begun) -> Shard:
    checksum = begun.digest.hexdigest()[:16]
    return Shard(number, begun.line, begun.offset, begun.size, begun.records, checksum, tuple(begun.repeated))


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FastKVError(f"{where}: is not UTF-8 (byte {error.start})") from None


def _name(entry: dict[str, Any], number: int) -> str:
    """The id of what is no prompt, if it has a usable one."""
    name = entry.get("id", number)
    return str(name) if isinstance(name, (str, int)) and not isinstance(name, bool) else str(number)


def _unrepeated(line: Line, shard: Shard) -> Line:
    if line.number not in shard.repeated:
        return line
    given = "" if line.id != str(line.number) else ", which a line without an id is named by"
    error = FastKVError(f"line {line.number}: an earlier prompt has the id {line.id}{given}; give each its own")
    return Line(line.number, line.id, None, str(error))
