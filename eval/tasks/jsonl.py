"""A user's file of JSON objects, one a line. Knows nothing of what they hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError


def read_jsonl(path: Path, setting: str, holds: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Every object with the place it stands in (`FILE, line N`), and a checksum of the file.

    setting: what named the file, for the flag in front of a message; holds: what the objects are to have.
    Raises FastKVError for a file that cannot be read, a line that is no JSON object, and a file without any.
    """
    data, text = read_text(path, setting)
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise FastKVError(f"{path}: has no lines; write one object with {holds} a line", setting=setting)
    return [(where, _object(where, line, setting, holds)) for where, line in lines], checksum(data)


def read_text(path: Path, setting: str) -> tuple[bytes, str]:
    """A file's bytes and its text, without a byte-order mark. Raises FastKVError where it is not there or not UTF-8."""
    try:
        data = path.read_bytes()
        return data, data.decode("utf-8-sig")
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})", setting=setting) from None
    except UnicodeDecodeError as error:
        raise FastKVError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8", setting=setting) from None


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
