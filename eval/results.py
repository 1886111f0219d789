"""What a run found, kept in a file from which it can continue.

JSON Lines: the first line is the header, everything that decides the outcome; each further line is the record of one
example under one policy. A record is appended the moment it is there, so a run that is stopped or killed has lost
nothing but the example it was at; a last line that was cut off is dropped when the run continues. One file is one run:
it is taken up again only by a command whose header is the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastkv.console.jsonl import RecordFile, difference
from fastkv.engine.output import Metrics

FORMAT = "fastkv-eval 1"
_NOT_COMPARED = ("date",)  # when a run began decides nothing


@dataclass(frozen=True)
class Record:
    """One example under one policy. `policy` is its label, `prompt_sha256` the beginning of the token ids' checksum.

    length is None where texts have their own; cut says that such a text lost its middle. Times in seconds, sizes in
    bytes. kv_bytes is what was allocated, room for the answer included; kv_entries are the prompt entries kept (a
    token's K and V in one KV head), kv_full_entries those of a full cache. attention_kept, read_bytes: of Metrics;
    None in older files, too. Where the question came later, context_tokens of the prompt's were read before it, in
    context_s, and ttft_s counts from the question. turn: which of several questions about one text, from 1 on; kv_bytes
    then has room for all of them.
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
    attention_kept: float | None = None
    read_bytes: int | None = None
    context_tokens: int | None = None
    context_s: float | None = None
    turn: int | None = None


_FIELDS = {field.name for field in fields(Record)}
_LATER = {"attention_kept", "read_bytes", "context_tokens", "context_s", "turn"}  # fields that older files lack
MEASURED = sorted(_FIELDS & {field.name for field in fields(Metrics)})  # as the engine measures them


class Results:
    """The records of a run, in memory and, where a path is given, in its file, which nobody else writes meanwhile.

    Raises FastKVError for a file that cannot be written, is no result file, or belongs to another run.
    """

    def __init__(self, header: dict[str, Any], path: Path | None = None) -> None:
        self.header: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **header}))
        self.records: list[Record] = []
        self.torn = False  # whether the file ended in the middle of a line
        self._file = None if path is None else RecordFile(path)
        if self._file is not None:
            try:
                self._continue(self._file)
            except BaseException:
                self._file.close()
                raise
        self.resumed = len(self.records)

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self._file is not None:
            self._file.append(asdict(record))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _continue(self, file: RecordFile) -> None:
        """Take over header and records of a file, or begin a new one."""
        self.torn = bool(file.tail)
        begun = json.dumps({"format": FORMAT})[:-1].encode()  # of a header that a run had no time to write
        if not file.objects and (begun.startswith(file.tail) or file.tail.startswith(begun)):
            file.drop_tail()
            file.append(self.header)
            return
        if not file.objects or file.objects[0].get("format") != FORMAT:
            raise file.refused("is no result file of this command")
        self._compare(file, file.objects[0])
        there: set[tuple[str, str]] = set()
        for number, line in enumerate(file.objects[1:], start=2):
            if not _FIELDS - _LATER <= set(line) <= _FIELDS:
                raise file.foreign(number)
            record = Record(**{**line, "answers": tuple(line["answers"])})
            if (record.id, record.policy) in there:
                raise file.refused("has the same example and policy as a line before", number)
            there.add((record.id, record.policy))
            self.records.append(record)
        file.drop_tail()

    def _compare(self, file: RecordFile, stored: dict[str, Any]) -> None:
        """Refuse another run's file. The header that counts is the one of the file."""
        keys = [key for key in {**stored, **self.header} if key not in _NOT_COMPARED]
        other = [
            f"{key} {difference(stored.get(key), self.header.get(key))}"
            for key in keys
            if stored.get(key) != self.header.get(key)
        ]
        if other:
            raise file.refused(f"is another run's, with {'; '.join(other)}")
        self.header = stored
