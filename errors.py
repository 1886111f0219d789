"""The exception that a user's mistake raises, the one for a fault, and the checks of settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

_LONGEST = 2_000  # characters of a message, whatever it quotes
_LARGEST = 2**63 - 1  # torch takes no larger integer
_HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs: what Python makes of bytes that are not UTF-8


class FastKVError(ValueError):
    """A mistake of the user's. Its message is the one line that the command prints.

    `setting` names the library setting at fault (`"kv_retention"`), where there is one, so that the command can
    name its flag (`--kv-retention`). `prompt` is the index of the prompt at fault in a list of them.
    """

    def __init__(self, message: str, *, setting: str | None = None, prompt: int | None = None) -> None:
        # What is quoted may be anything: the message stays one line of some length, and harmless on a terminal.
        super().__init__(one_line(message, _LONGEST))
        self.setting = setting
        self.prompt = prompt


class FaultError(FastKVError):
    """Not a mistake of the user's: something failed at work, such as numbers that overflowed.

    A FastKVError all the same, so that `except FastKVError` catches whatever the package has to say in one line; the
    commands end with exit status 1 for it, and with 2 for the others.
    """


def brief(value: object, longest: int = 200) -> str:
    """`value` as a message quotes it: its repr, without its middle where that has more than `longest` characters."""
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > 2 * longest:
        value = value[:longest] + value[-longest:]  # type: ignore[operator]  # what is cut out need not be written first
    try:
        return cut(repr(value), longest)
    except Exception:  # of an int with thousands of digits, or a class of the user's
        return f"<{type(value).__name__}>"


def cut(text: str, longest: int) -> str:
    """`text`, without its middle where it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - 1 - end]}…{text[len(text) - end :]}"


def writable(text: str) -> str:
    """`text` as any encoding of Unicode can write it: a byte of a file's name that is not UTF-8 as `\\xff`."""
    return _HALVES.sub(lambda half: _escape(ord(half.group())), text)


def one_line(text: str, longest: int) -> str:
    """`text` as one line that can be printed anywhere, cut to about `longest` characters."""
    return "".join(character if character.isprintable() else " " for character in writable(cut(text, longest)))


def _escape(half: int) -> str:
    return f"\\x{half - 0xDC00:02x}" if 0xDC80 <= half <= 0xDCFF else f"\\u{half:04x}"


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise FastKVError unless `value` is an int (a bool is not one) of at least `low` and at most `high`.

    What 64 bits cannot hold is too large, whatever `high` says.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and high is None and value > _LARGEST:
        high = _LARGEST
    if whole and value >= low and (high is None or value <= high):
        return
    upper = "" if high is None else f" and at most {high}"
    raise FastKVError(f"{name} must be a whole number of at least {low}{upper}, not {brief(value)}", setting=name)


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise FastKVError unless `value` is a finite number in [low, high], or in (low, high] where `above`."""
    number = _as_float(value)
    if abs(number) < math.inf and number <= high and (number > low if above else number >= low):
        return
    lower = f"above {low:g}" if above else f"of at least {low:g}"
    upper = "" if math.isinf(high) else f" and at most {high:g}"
    raise FastKVError(f"{name} must be a number {lower}{upper}, not {brief(value)}", setting=name)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise FastKVError unless `value` is one of the names in `choices`."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise FastKVError(f"{name} must be one of {', '.join(known)}, not {brief(value)}", setting=name)


def check_switch(name: str, value: Any) -> None:
    """Raise FastKVError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise FastKVError(f"{name} must be True or False, not {brief(value)}", setting=name)


def _as_float(value: Any) -> float:
    """NaN for what is no number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
