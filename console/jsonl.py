"""JSON Lines: a user's file of objects, and the file of records that a stopped run continues."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from fastkv.console.files import check_regular, read_text
from fastkv.console.lock import holder, lock
from fastkv.errors import FastKVError
from fastkv.storage import try_beside, unwritable

_LONGEST = 80  # characters that are shown of a value
_PATIENCE = 0.5  # seconds for another process that only looks whether the file is free


def read_objects(path: Path, setting: str, holds: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Every object with the place it stands in (`FILE, line N`), and a checksum of the file.

    setting: what named the file, for the flag in front of a message; holds: what the objects are to have.
    Raises FastKVError for a file that cannot be read, a line that is no JSON object, and a file without any.
    """
    data, text = read_text(path, setting)
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise FastKVError(f"{path}: has no lines; write one object with {holds} a line", setting=setting)
    return [(where, object_of(where, line, setting, holds)) for where, line in lines], checksum(data)


def checksum(data: bytes) -> str:
    """The beginning of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def object_of(where: str, line: str, setting: str, holds: str) -> dict[str, Any]:
    """The object of one line. Raises FastKVError, naming the place, for a line that is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise FastKVError(f"{where}: is not JSON; write one object a line", setting=setting) from None
    if not isinstance(value, dict):
        raise FastKVError(f"{where}: is no object with {holds}", setting=setting)
    return value


def check_output(path: str | Path) -> None:
    """FastKVError, before the work begins, where a RecordFile could not be written or another process writes it."""
    path = Path(path)
    check_regular(path, "output")
    try:
        if os.path.exists(path):
            with path.open("ab") as file:
                if not lock(file, shared=True):
                    raise _is_taken(path, file)
        else:
            try_beside(path)  # not the file itself: another process may be about to make it
    except OSError as error:
        raise unwritable(path, error, "output") from None


class RecordFile:
    """The file of `--output`: one JSON object a line, each there for good as soon as it is appended.

    Nobody else writes it until it is closed. objects: what it holds already, in order. tail: what stands after the last
    whole line, the beginning of a record where a run was stopped while it wrote; `drop_tail` takes it away. Raises
    FastKVError for a file that cannot be written, that another process writes, and for a line that is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path, "output")
        self.path = path
        try:
            self._file = _opened(path)
            try:
                data = self._file.read()
                self._whole = data.rfind(b"\n") + 1
                self.tail = data[self._whole :]
                lines = data[: self._whole].splitlines()
                self.objects = [self._parsed(number, line) for number, line in enumerate(lines, 1)]
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise unwritable(path, error, "output") from None

    def drop_tail(self) -> None:
        self._file.truncate(self._whole)
        self.tail = b""

    def append(self, record: dict[str, Any]) -> None:
        """Raises FaultError where the disk is full; the file then ends as it did before, or in a part of the record."""
        line = as_line(record)
        try:
            end = self._file.seek(0, os.SEEK_END)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise unwritable(self.path, error, "output") from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def foreign(self, number: int) -> FastKVError:
        """The complaint about a line that is no record."""
        return self.refused("is no record of such a run", number)

    def refused(self, why: str, number: int | None = None) -> FastKVError:
        """A complaint about the file, or a line of it."""
        where = self.path if number is None else f"{self.path}, line {number}"
        return FastKVError(f"{where}: {why}; name another file", setting="output")

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.foreign(number)
        return value


def difference(stored: Any, wanted: Any) -> str:
    """Both values; of long ones the part that begins shortly before they differ."""
    texts = [json.dumps(value) for value in (stored, wanted)]
    same = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), 0)
    start = max(0, same - 20) if max(map(len, texts)) > _LONGEST else 0
    return ", not ".join(_brief(text, start) for text in texts)


def _brief(text: str, start: int) -> str:
    end = start + _LONGEST
    return f"{'…' * (start > 0)}{text[start:end]}{'…' * (len(text) > end)}"


def as_line(record: dict[str, Any]) -> bytes:
    """One line of UTF-8, whatever texts the record holds: halves of surrogate pairs are JSON's escapes."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def _opened(path: Path) -> FileIO:
    """The file, which is ours alone from here on."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        file = FileIO(path, "a+")
        try:
            if lock(file):
                if _is_still(path, file):
                    file.seek(0)
                    return file
            elif time.monotonic() > deadline:
                raise _is_taken(path, file)
        except BaseException:
            file.close()
            raise
        file.close()
        time.sleep(_PATIENCE / 20)


def _is_still(path: Path, file: FileIO) -> bool:
    """Whether the open file is the one that has the name now: it may have been deleted since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_taken(path: Path, file: IO[bytes]) -> FastKVError:
    return FastKVError(
        f"{path}: {holder(file)} is writing to it; wait until it has ended, or name another file", setting="output"
    )
