"""JSON Lines: a user's file of objects, and the file of records that a stopped run continues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

from fastkv.console.files import check_regular, check_writable, read_text, unwritable
from fastkv.console.lock import holder, lock
from fastkv.errors import FastKVError

_LONGEST = 80  # characters that are shown of a value


def read_objects(path: Path, setting: str, holds: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Every object with the place it stands in (`FILE, line N`), and a checksum of the file.

    setting: what named the file, for the flag in front of a message; holds: what the objects are to have.
    Raises FastKVError for a file that cannot be read, a line that is no JSON object, and a file without any.
    """
    data, text = read_text(path, setting)
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise FastKVError(f"{path}: has no lines; write one object with {holds} a line", setting=setting)
    return [(where, _object(where, line, setting, holds)) for where, line in lines], checksum(data)


def checksum(data: bytes) -> str:
    """The beginning of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def _object(where: str, line: str, setting: str, holds: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise FastKVError(f"{where}: is not JSON; write one object a line", setting=setting) from None
    if not isinstance(value, dict):
        raise FastKVError(f"{where}: is no object with {holds}", setting=setting)
    return value


def check_output(path: str | Path) -> None:
    """FastKVError, before the work begins, where a RecordFile could not be written or another process writes it."""
    check_regular(Path(path), "output")
    check_writable(path, "output")
    if Path(path).exists():
        with Path(path).open("rb") as file:
            _take_lock(path, file)


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
            self._file = path.open("a+b")
            try:
                _take_lock(path, self._file)
                self._file.seek(0)
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
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

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


def _take_lock(path: str | Path, file: IO[bytes]) -> None:
    if not lock(file):
        raise FastKVError(
            f"{path}: {holder(file)} is writing to it; wait until it has ended, or name another file", setting="output"
        )
