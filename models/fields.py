"""A JSON object read from a model folder, with typed access: every complaint names the file and the key."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError, brief
from fastkv.models.files import check_ordinary
from fastkv.models.lacking import no_file

_REQUIRED = object()
_MOST = 2**31 - 1  # no size or length of a model comes near
_DIGITS = 4300  # of an integer: Python itself refuses longer ones, with advice for programmers


class Fields:
    """The keys of one JSON object. A key that is missing or null takes the default; without one it is an error."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Read `path`; FastKVError if it is not there, not JSON, or not an object."""
        check_ordinary(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
        except FileNotFoundError:
            raise FastKVError(no_file(path)) from None
        except OSError as error:
            raise FastKVError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise FastKVError(f"{path}: not valid JSON ({error}); fetch the file again") from None
        if not isinstance(values, dict):
            raise FastKVError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return cls(values, str(path))

    @classmethod
    def read_optional(cls, path: Path) -> Fields:
        """Like `read`, but a file that is not there gives no keys at all."""
        # lexists: a link that leads nowhere is a file that got lost
        return cls.read(path) if os.path.lexists(path) else cls({}, str(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def complain(self, key: str, wanted: str) -> FastKVError:
        return FastKVError(f"{self.source}: {key} must be {wanted}, not {brief(self.values.get(key))}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise FastKVError(f"{self.source}: the key {key!r} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MOST:
            raise self.complain(key, f"a whole number of at least {low} and at most {_MOST}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise self.complain(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.complain(key, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.complain(key, "a string")
        return value

    def section(self, key: str) -> Fields | None:
        """The object under `key` as Fields of its own, or None where there is none."""
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.complain(key, "an object")
        return Fields(value, f"{self.source}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; () where the key is missing."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= _MOST for i in ids):
            raise self.complain(key, "a token id or a list of them")
        return tuple(ids)


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
