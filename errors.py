"""The exception that a user's mistake raises, the one for a fault, and the checks of settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class FastKVError(ValueError):
    """A mistake of the user's. Its message is the one line that the command prints.

    `setting` names the library setting at fault (`"kv_retention"`), where there is one, so that the command can
    name its flag (`--kv-retention`). `prompt` is the index of the prompt at fault in a list of them.
    """

    def __init__(self, message: str, *, setting: str | None = None, prompt: int | None = None) -> None:
        # Names from a model's files may hold anything: the message stays one line, and harmless on a terminal.
        super().__init__("".join(character if character.isprintable() else " " for character in message))
        self.setting = setting
        self.prompt = prompt


class FaultError(FastKVError):
    """Not a mistake of the user's: something failed at work, such as numbers that overflowed.

    A FastKVError all the same, so that `except FastKVError` catches whatever the package has to say in one line; the
    commands end with exit status 1 for it, and with 2 for the others.
    """


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise FastKVError unless `value` is an int (a bool is not one) of at least `low` and at most `high`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and value >= low and (high is None or value <= high):
        return
    upper = "" if high is None else f" and at most {high}"
    raise FastKVError(f"{name} must be a whole number of at least {low}{upper}, not {value!r}", setting=name)


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise FastKVError unless `value` is a finite number in [low, high], or in (low, high] where `above`."""
    number = _as_float(value)
    if abs(number) < math.inf and number <= high and (number > low if above else number >= low):
        return
    lower = f"above {low:g}" if above else f"of at least {low:g}"
    upper = "" if math.isinf(high) else f" and at most {high:g}"
    raise FastKVError(f"{name} must be a number {lower}{upper}, not {value!r}", setting=name)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise FastKVError unless `value` is one of the names in `choices`."""
    known = list(choices)
    if value not in known:
        raise FastKVError(f"{name} must be one of {', '.join(known)}, not {value!r}", setting=name)


def _as_float(value: Any) -> float:
    """NaN for what is no number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
