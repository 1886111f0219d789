"""The policies of a run, each written as `NAME` or `NAME:setting=value,setting=value`.

Several values of one setting stand between slashes: `fastkv:tsp_layer=9/15/23,tsp_rate=0.5/0.2/0.1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastkv.cli import build_policy
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy


@dataclass(frozen=True)
class PolicySpec:
    """A policy under the name that the user gave it."""

    label: str
    policy: Policy


def parse_policies(texts: list[str], n_layers: int | None = None) -> list[PolicySpec]:
    """The policies of a command line; with `n_layers`, checked against a model of so many.

    Raises FastKVError for an unknown policy, a setting it does not have, a value out of range, and one named twice.
    """
    found: list[PolicySpec] = []
    for text in texts:
        spec = _parse(text, n_layers)
        twin = next((other for other in found if other.policy == spec.policy), None)
        if twin is not None:
            raise FastKVError(f"--policy {text}: is the same policy as {twin.label}; leave one of them out")
        found.append(spec)
    return found


def read_settings(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings that a policy is written with; neither is checked yet."""
    name, _, settings = text.partition(":")
    values: dict[str, Any] = {}
    for part in settings.split(",") if settings else []:
        setting, equals, value = part.partition("=")
        if not equals or not setting.strip():
            raise FastKVError(f"--policy {text}: must be NAME or NAME:setting=value,…; {part!r} is no setting=value")
        key = setting.strip().replace("-", "_")
        if key in values:
            raise FastKVError(f"--policy {text}: has {key} twice; several values of one setting stand between slashes")
        values[key] = _value(value.strip())
    return name.strip(), values


def _parse(text: str, n_layers: int | None) -> PolicySpec:
    name, values = read_settings(text)
    try:
        policy = build_policy(name, values)
        if n_layers is not None:
            policy.validate(n_layers)
    except FastKVError as error:
        raise FastKVError(f"--policy {text}: {error}") from None
    return PolicySpec(text, policy)


def _value(text: str) -> Any:
    """A number where it is one, a tuple where all parts between slashes are; the policy itself says whether it fits."""
    parts = [_number(part) for part in text.split("/")]
    if len(parts) > 1 and not any(isinstance(part, str) for part in parts):
        return tuple(parts)
    return _number(text)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
