"""A policy by its name and settings, and as one word of a command line: `NAME` or `NAME:setting=value,setting=value`.

Several values of one setting stand between slashes: `fastkv:tsp_layer=9/15/23,tsp_rate=0.5/0.2/0.1`.
"""

from __future__ import annotations

from typing import Any

from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Policy
from fastkv.cache.setting import SWITCH_WORDS, settings_of
from fastkv.console.parser import flag_of
from fastkv.errors import FastKVError, brief


def build_policy(name: str, settings: dict[str, Any]) -> Policy:
    """The policy of that name with these settings; FastKVError for an unknown name or a setting it does not have."""
    if name not in POLICIES:
        raise FastKVError(f"policy must be one of {', '.join(POLICIES)}, not {brief(name)}", setting="policy")
    policy = POLICIES[name]
    for setting in settings:
        if setting not in settings_of(policy):
            raise FastKVError(f"{flag_of(setting)} is no setting of --policy {name}; leave one of them out")
    return policy(**settings)


def read_settings(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings that a policy is written with; neither is checked yet."""
    name, _, settings = text.partition(":")
    values: dict[str, Any] = {}
    for part in settings.split(",") if settings else []:
        setting, equals, value = part.partition("=")
        if not equals or not setting.strip():
            raise FastKVError(f"must be NAME or NAME:setting=value,…; {brief(part)} is no setting=value")
        key = setting.strip().replace("-", "_")
        if key in values:
            raise FastKVError(f"has {key} twice; several values of one setting stand between slashes")
        values[key] = _value(value.strip())
    return name.strip(), values


def write_settings(name: str, settings: dict[str, Any]) -> str:
    """What `read_settings` reads."""
    values = {key: "/".join(map(_written, v)) if isinstance(v, tuple) else _written(v) for key, v in settings.items()}
    return f"{name}:{','.join(f'{key}={value}' for key, value in values.items())}"


def _written(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _value(text: str) -> Any:
    """A number or yes or no where it is one, a tuple where all parts between slashes are numbers.

    The policy itself says whether it fits.
    """
    parts = tuple(map(_word, text.split("/")))
    return parts if len(parts) > 1 and not {str, bool} & set(map(type, parts)) else _word(text)


def _word(text: str) -> int | float | bool | str:
    if text.lower() in SWITCH_WORDS:
        return SWITCH_WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
