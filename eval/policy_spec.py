"""The policies of a run, each written as `NAME` or `NAME:setting=value,setting=value`.

Several values of one setting stand between slashes: `fastkv:tsp_layer=9/15/23,tsp_rate=0.5/0.2/0.1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkv.cache.policy import Policy
from fastkv.cli import build_policy
from fastkv.errors import FastKVError


@dataclass(frozen=True)
class PolicySpec:
    """A policy of a run. label: all its settings, as `--policy` takes them; it is the policy's name in the records.

    title: as tables name it, where that is shorter. retention: the share of a prompt's KV that it keeps, where a run
    compares policies at equal shares; None for the full cache.
    """

    label: str
    policy: Policy
    title: str = ""
    retention: float | None = None


def parse_policies(texts: list[str], n_layers: int | None = None) -> list[PolicySpec]:
    """The policies of a command line; with `n_layers`, checked against a model of so many.

    Raises FastKVError for an unknown policy, a setting it does not have, a value out of range, and one named twice.
    """
    found: list[PolicySpec] = []
    for text in texts:
        try:
            spec = PolicySpec(text, build_policy(*read_settings(text)))
            if n_layers is not None:
                spec.policy.validate(n_layers)
            check_twin(spec, found)
        except FastKVError as error:
            raise FastKVError(f"--policy {text}: {error}") from None
        found.append(spec)
    return found


def check_twin(spec: PolicySpec, others: list[PolicySpec]) -> None:
    """FastKVError where one of the others is the very same policy."""
    twin = next((other for other in others if other.policy == spec.policy), None)
    if twin is not None:
        raise FastKVError(f"is the same policy as {twin.title or twin.label}; leave one of them out")


def read_settings(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings that a policy is written with; neither is checked yet."""
    name, _, settings = text.partition(":")
    values: dict[str, Any] = {}
    for part in settings.split(",") if settings else []:
        setting, equals, value = part.partition("=")
        if not equals or not setting.strip():
            raise FastKVError(f"must be NAME or NAME:setting=value,…; {part!r} is no setting=value")
        key = setting.strip().replace("-", "_")
        if key in values:
            raise FastKVError(f"has {key} twice; several values of one setting stand between slashes")
        values[key] = _value(value.strip())
    return name.strip(), values


def _value(text: str) -> Any:
    """A number where it is one, a tuple where all parts between slashes are; the policy itself says whether it fits."""
    parts = tuple(map(_number, text.split("/")))
    return parts if len(parts) > 1 and str not in map(type, parts) else _number(text)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
