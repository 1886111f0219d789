"""A setting of a policy: a dataclass field that says what it takes and what it is for.

The policy checks it by that, and the command line and the docs read it (cache/catalogue.py). Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastkv.errors import FastKVError, check_choice, check_integer, check_number, check_switch

_KEY = "fastkv.setting"
_NONE = "fastkv.no_setting"


@dataclass(frozen=True)
class Values:
    """What a setting takes.

    read: the value that the text of a flag means; raises ValueError. Its `__name__` is what argparse calls it.
    check: takes the setting's name and a value, and returns the value as the policy is to hold it; raises FastKVError.
    """

    read: Callable[[str], Any]
    check: Callable[[str, Any], Any]


@dataclass(frozen=True)
class Setting:
    """What `setting` was told. default: as help texts tell it; empty where there is none to tell."""

    values: Values
    help: str
    metavar: str
    default: str


def setting(default: Any, values: Values, help: str, *, metavar: str, unset: str = "") -> Any:
    """A dataclass field with this default, for a class that is `@dataclass(frozen=True, kw_only=True)`.

    help: one line without the default, which is told from `default` itself. A default of None means that the setting
    may be left unset, and is not checked then; `unset` tells what that means ("half way up"). metavar: of its flag.
    """
    told = unset if default is None else str(default)
    return dataclasses.field(default=default, metadata={_KEY: Setting(values, help, metavar, told)})


def redefined(policy: type, name: str, default: Any) -> Any:
    """The setting of a base class once more, for a derived class that has another default."""
    declared = settings_of(policy)[name]
    return setting(default, declared.values, declared.help, metavar=declared.metavar)


def no_setting(default: Any) -> Any:
    """A field of a base class that is no setting of a derived one: listed nowhere, and refused at any other value."""
    return dataclasses.field(default=default, metadata={_NONE: True})


def settings_of(policy: type) -> dict[str, Setting]:
    """The settings of a class by name, in the order of its fields: those fields that `setting` made."""
    fields = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    return {field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata}


def check_settings(policy: object) -> None:
    """Check each setting of a policy by itself. Raises FastKVError for the first value out of range."""
    for field in dataclasses.fields(policy):  # type: ignore[arg-type]
        value = getattr(policy, field.name)
        if _NONE in field.metadata and value != field.default:
            name = getattr(policy, "name", type(policy).__name__)
            raise FastKVError(f"{field.name} is no setting of {name}; leave it at {field.default}", setting=field.name)
        if _KEY not in field.metadata or (value is None and field.default is None):
            continue
        held = field.metadata[_KEY].values.check(field.name, value)
        if held is not value:
            object.__setattr__(policy, field.name, held)  # the class is frozen


def whole(low: int, high: int | None = None) -> Values:
    """Whole numbers from `low` to `high`."""

    def check(name: str, value: Any) -> Any:
        check_integer(name, value, low, high)
        return value

    return Values(int, check)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Values:
    """Finite numbers in [low, high], or in (low, high] where `above`."""

    def check(name: str, value: Any) -> Any:
        check_number(name, value, low, high, above=above)
        return value

    return Values(float, check)


def choice(*names: str) -> Values:
    """One of these names."""

    def check(name: str, value: Any) -> Any:
        check_choice(name, value, names)
        return value

    return Values(str, check)


SWITCH_WORDS = {"yes": True, "no": False, "true": True, "false": False}


def switch() -> Values:
    """True or False: as a flag `yes` or `no`."""

    def read(text: str) -> Any:
        if text.lower() not in SWITCH_WORDS:
            raise ValueError(text)
        return SWITCH_WORDS[text.lower()]

    def check(name: str, value: Any) -> Any:
        check_switch(name, value)
        return value

    read.__name__ = "yes or no"
    return Values(read, check)


def one_or_more(values: Values) -> Values:
    """One of these values, or several: as a flag `0.5,0.2`, in Python a tuple. A list is held as a tuple."""

    def read(text: str) -> Any:
        several = tuple(values.read(part) for part in text.split(","))
        return several if len(several) > 1 else several[0]

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            return values.check(name, value)
        if not value:
            raise FastKVError(f"{name} must not be empty", setting=name)
        return tuple(values.check(name, one) for one in value)

    read.__name__ = values.read.__name__
    return Values(read, check)
