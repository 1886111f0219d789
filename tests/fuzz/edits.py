"""Changes to the files of a model folder, as values: they can be sent to a process, printed and left out one by one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fuzz.base_folders import Files

GONE = "(gone)"  # as a value: the key is taken away


@dataclass(frozen=True)
class Bytes:
    """Bytes that are told shortly: `unit` so many times, between two ends."""

    start: bytes = b""
    unit: bytes = b""
    times: int = 0
    end: bytes = b""

    def whole(self) -> bytes:
        return self.start + self.unit * self.times + self.end


@dataclass(frozen=True)
class Text:
    """A string inside JSON that is told shortly."""

    unit: str
    times: int

    def whole(self) -> str:
        return self.unit * self.times


class Edit(Protocol):
    @property
    def file(self) -> str: ...

    def apply(self, files: Files) -> None: ...


@dataclass(frozen=True)
class Put:
    """A value at a place of a JSON file: keys, or numbers of entries. Places that are not there are left alone."""

    file: str
    place: tuple[str | int, ...]
    value: Any

    def apply(self, files: Files) -> None:
        values = _parsed(files, self.file)
        holder = values
        for key in self.place[:-1]:
            if isinstance(holder, dict) and isinstance(key, str):
                holder = holder.setdefault(key, {})
            elif isinstance(holder, list) and isinstance(key, int) and holder:
                holder = holder[key % len(holder)]
            else:
                return
        _put(holder, self.place[-1], self.value)
        files[self.file] = json.dumps(values, default=lambda told: told.whole()).encode()


@dataclass(frozen=True)
class PutSomewhere:
    """A value in the place of the n-th of all values of a JSON file, whatever that is."""

    file: str
    number: int
    value: Any

    def apply(self, files: Files) -> None:
        values = _parsed(files, self.file)
        places = list(_places(values))
        if places:
            holder, key = places[self.number % len(places)]
            _put(holder, key, self.value)
            files[self.file] = json.dumps(values, default=lambda told: told.whole()).encode()


@dataclass(frozen=True)
class Content:
    file: str
    content: Bytes

    def apply(self, files: Files) -> None:
        files[self.file] = self.content.whole()


@dataclass(frozen=True)
class Cut:
    """The file ends after this share of its bytes."""

    file: str
    share: float

    def apply(self, files: Files) -> None:
        content = files.get(self.file, b"")
        files[self.file] = content[: int(self.share * len(content))]


@dataclass(frozen=True)
class Flip:
    """One byte is another, at a place counted from the start (from the end, if negative)."""

    file: str
    at: int
    mask: int

    def apply(self, files: Files) -> None:
        content = bytearray(files.get(self.file, b""))
        if content:
            content[self.at % len(content)] ^= self.mask
            files[self.file] = bytes(content)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: a value at a place of its JSON, or another length than it has.

    tensor: the n-th of them. key: one of a tensor's three, or "" for all of it.
    """

    file: str
    tensor: int
    key: str
    value: Any
    length: int | None = None

    def apply(self, files: Files) -> None:
        content = files.get(self.file, b"")
        if len(content) < 8:
            return
        (size,) = struct.unpack("<Q", content[:8])
        try:
            header = json.loads(content[8 : 8 + size])
        except ValueError:
            return
        names = list(header) if isinstance(header, dict) else []
        if names:
            name = names[self.tensor % len(names)]
            holder, key = (header[name], self.key) if self.key else (header, name)
            _put(holder, key, self.value)
        written = json.dumps(header, default=lambda told: told.whole()).encode()
        length = len(written) if self.length is None else self.length
        files[self.file] = struct.pack("<Q", length % 2**64) + written + content[8 + size :]


@dataclass(frozen=True)
class Renamed:
    file: str
    name: str

    def apply(self, files: Files) -> None:
        if self.file in files:
            files[self.name] = files.pop(self.file)


@dataclass(frozen=True)
class Special:
    """What is no ordinary file: "folder", "pipe", "unreadable", "missing", or "link to …"."""

    file: str
    kind: str

    def apply(self, files: Files) -> None:
        if self.kind == "missing":
            files.pop(self.file, None)

    def finish(self, folder: Path) -> None:
        """When the files are written."""
        path = folder / self.file
        if self.kind == "unreadable":
            if path.is_symlink():
                path.unlink()
            path.touch()
            path.chmod(0)
        elif self.kind != "missing" and path.is_dir() and not path.is_symlink():  # by an edit before this one
            path.rmdir()
        elif self.kind != "missing":
            path.unlink(missing_ok=True)
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "pipe":
            os.mkfifo(path)
        elif self.kind.startswith("link to "):
            path.symlink_to(self.kind.removeprefix("link to "))


def _parsed(files: Files, name: str) -> Any:
    try:
        return json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}


def _put(holder: Any, key: str | int, value: Any) -> None:
    if isinstance(holder, dict) and isinstance(key, str):
        holder.pop(key, None)
        if value != GONE:
            holder[key] = value
    elif isinstance(holder, list) and isinstance(key, int) and holder:
        holder[key % len(holder)] = value


def _places(values: Any) -> Iterator[tuple[Any, str | int]]:
    entries: Any = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(entries):
        yield values, key
        yield from _places(value)
