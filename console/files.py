"""Files that are read and written: whether they can be is found out before the work is done, not after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError, writable
from fastkv.storage import is_endless, is_odd, try_beside, unwritable, write_atomically


def read_text(path: Path, setting: str) -> tuple[bytes, str]:
    """A file's bytes and its text, without a byte-order mark. Raises FastKVError where it is not there or not UTF-8."""
    if is_endless(path):
        raise FastKVError(f"{path}: cannot be read, for it is a device", setting=setting)
    try:
        data = path.read_bytes()
        return data, data.decode("utf-8-sig")
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})", setting=setting) from None
    except UnicodeDecodeError as error:
        raise FastKVError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8", setting=setting) from None


def check_readable(path: Path, setting: str) -> None:
    """FastKVError, before the work begins, for a file that is not there or cannot be read, and for what is none."""
    check_ordinary(path, setting)
    try:
        path.open("rb").close()
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})", setting=setting) from None


def check_ordinary(path: Path, setting: str) -> None:
    """FastKVError for a folder, pipe or device, where a file is to be read, perhaps more than once."""
    if is_odd(path):
        raise FastKVError(f"{path}: cannot be read, for it is no ordinary file", setting=setting)


def read_json(path: Path, setting: str, holds: str) -> dict[str, Any]:
    """The object of a JSON file. Raises FastKVError where there is none; holds: what it is to have."""
    check_ordinary(path, setting)
    text = read_text(path, setting)[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # of JSON, and of a number with thousands of digits
        value = None
    if not isinstance(value, dict):
        raise FastKVError(f"{path}: is no JSON object with {holds}", setting=setting)
    return value


def write_whole(path: str | Path, content: str | bytes, setting: str) -> None:
    """Write a file in one step (`write_atomically`), a pipe or a device as it is.

    Raises FastKVError, naming the setting, where that cannot be done; the earlier file is there still.
    """
    data = writable(content).encode() if isinstance(content, str) else content
    try:
        if _takes_its_place(path):
            write_atomically(Path(path), data)
        else:
            Path(path).write_bytes(data)
    except OSError as error:
        raise unwritable(path, error, setting) from None


def check_writable(path: str | Path, setting: str) -> None:
    """Raise FastKVError, naming the setting, unless `write_whole` can write `path`. An existing file stays as it is."""
    try:
        if os.path.isfile(path) or os.path.isdir(path):  # no pipe or device: opening one might block, or be seen
            Path(path).open("ab").close()
        if _takes_its_place(path):
            try_beside(Path(path))
    except OSError as error:
        raise unwritable(path, error, setting) from None


def check_replaceable(path: Path, setting: str) -> None:
    """The same, and FastKVError for what is no ordinary file."""
    check_regular(path, setting)
    check_writable(path, setting)


def _takes_its_place(path: str | Path) -> bool:
    """Whether a new file can stand for what is at `path`: nothing, or an ordinary file."""
    return os.path.isfile(path) or not os.path.exists(path)


def check_own_file(path: Path, kind: str) -> None:
    """Before hours of work: --output can be put there, and a file that is there is empty or of this `kind`."""
    check_replaceable(path, "output")
    if not os.path.exists(path):
        return
    try:
        with path.open("rb") as file:
            beginning = file.read(100)  # which has the kind, in the files of a command that writes one
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})", setting="output") from None
    if beginning and kind.encode() not in beginning:
        raise FastKVError(
            f"{path}: is there already, and is none of this command's; name another one", setting="output"
        )


def check_regular(path: Path, setting: str) -> None:
    """FastKVError for a folder, pipe or device: reading it might never end, and no file must take its place."""
    if not _takes_its_place(path):
        raise FastKVError(f"{path}: cannot be written, for it is no ordinary file; name another one", setting=setting)


def check_folder(folder: Path, setting: str) -> None:
    """Raise FastKVError, naming the setting, unless files can be put into `folder`, which may not be there yet."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        which = "is" if there == folder else f"{there} is"
        raise FastKVError(f"{folder}: {which} no folder; name another one", setting=setting)
    if not os.access(there, os.W_OK):
        raise FastKVError(f"{folder}: the folder {there} cannot be written to", setting=setting)
