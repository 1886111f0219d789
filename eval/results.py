"""What a run found, kept in a file from which it can go on.

JSON Lines: the first line is the header, everything that decides the outcome; each further line is the record of one
example under one policy. A record is appended the moment it is there, so a run that is stopped or killed has lost
nothing but the example it was at; a last line that was cut off is dropped when the run goes on. One file is one run: it
is taken up again only by a command whose header is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from fastkv.console.files import write_atomically
from fastkv.errors import FastKVError

FORMAT = "fastkv-eval 1"
_NOT_COMPARED = ("date",)  # when a run began decides nothing
LONGEST = 80  # characters that are shown of a value


@dataclass(frozen=True)
class Record:
    """One example under one policy. `policy` is its label, `prompt_sha256` the beginning of the token ids' checksum.

    length is None where texts have their own; cut says that such a text lost its middle. Times in seconds, sizes in
    bytes. kv_bytes is what was allocated, room for the answer included; kv_entries are the prompt entries kept (a
    token's K and V in one KV head), kv_full_entries those of a full cache.
    """

    id: str
    policy: str
    task: str
    length: int | None
    depth: float | None
    index: int
    prompt_sha256: str
    prompt_tokens: int
    new_tokens: int
    answers: tuple[str, ...]
    prediction: str
    score: float
    ttft_s: float
    decode_tokens_per_s: float | None
    kv_bytes: int
    kv_full_bytes: int
    kv_entries: int
    kv_full_entries: int
    cut: bool = False


class Results:
    """The records of a run, in memory and, where a path is given, in its file.

    Raises FastKVError for a file that cannot be written, is no result file, or belongs to another run.
    """

    def __init__(self, header: dict[str, Any], path: Path | None = None) -> None:
        self.header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **header}))
        self.records: list[Record] = []
        self.torn = False  # whether the file ended in the middle of a line
        self._file: BinaryIO | None = None
        if path is not None:
            self._file = self._open(path)
        self.resumed = len(self.records)

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(asdict(record)))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> BinaryIO:
        if path.exists() and not path.is_file():  # a device would be replaced by a file
            raise FastKVError(f"--output {path}: cannot be written, for it is no file; name another one")
        try:
            if not path.exists() or path.stat().st_size == 0:
                write_atomically(path, _line(self.header))
            whole = self._read(path)
            file = path.open("r+b")
            file.truncate(whole)
            file.seek(whole)
            return file
        except OSError as error:
            raise FastKVError(f"--output {path}: cannot be written ({error.strerror})") from None

    def _read(self, path: Path) -> int:
        """Take over header and records; the bytes that hold whole lines."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        self.torn = whole < len(data)
        lines = list(_objects(path, data[:whole]))
        if not lines or lines[0].get("format") != FORMAT:
            raise FastKVError(f"--output {path}: is no result file of this command; name another file")
        self._compare(path, lines[0])
        self.header = lines[0]
        known = {field.name for field in fields(Record)}
        there: set[tuple[str, str]] = set()
        for number, line in enumerate(lines[1:], start=2):
            if set(line) != known:
                raise FastKVError(f"--output {path}, line {number}: is no record of a run; name another file")
            record = Record(**{**line, "answers": tuple(line["answers"])})
            if (record.id, record.policy) in there:
                raise FastKVError(
                    f"--output {path}, line {number}: has the same example and policy as a line before; did two runs "
                    "write to it at once? Name another file"
                )
            there.add((record.id, record.policy))
            self.records.append(record)
        return whole

    def _compare(self, path: Path, stored: dict[str, Any]) -> None:
        keys = [key for key in {**stored, **self.header} if key not in _NOT_COMPARED]
        other = [
            f"{key} {_difference(stored.get(key), self.header.get(key))}"
            for key in keys
            if stored.get(key) != self.header.get(key)
        ]
        if other:
            raise FastKVError(f"--output {path}: is another run's, with {'; '.join(other)}; name another file")


def _objects(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise FastKVError(f"--output {path}, line {number}: cannot be read; name another file")
        yield value


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _difference(stored: Any, wanted: Any) -> str:
    """Both values; of long ones the part that begins shortly before they differ."""
    texts = [json.dumps(value) for value in (stored, wanted)]
    same = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), 0)
    start = max(0, same - 20) if max(map(len, texts)) > LONGEST else 0
    return ", not ".join(_brief(text, start) for text in texts)


def _brief(text: str, start: int) -> str:
    end = start + LONGEST
    return f"{'…' * (start > 0)}{text[start:end]}{'…' * (len(text) > end)}"
