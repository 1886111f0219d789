"""The policies of a run, each written as `NAME` or `NAME:setting=value,setting=value`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkv.cli import build_policy
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy


@dataclass(frozen=True)
class Contender:
    """A policy under the name that the user gave it."""

    label: str
    policy: Policy


def parse_contenders(texts: list[str], n_layers: int | None = None) -> list[Contender]:
    """The policies of a command line; with `n_layers`, checked against a model of so many.

    Raises FastKVError for an unknown policy, a setting it does not have, a value out of range, and one named twice.
    """
    found: list[Contender] = []
    for text in texts:
        contender = _parse(text, n_layers)
        twin = next((other for other in found if other.policy == contender.policy), None)
        if twin is not None:
            raise FastKVError(f"--policy {text}: is the same policy as {twin.label}; leave one of them out")
        found.append(contender)
    return found


def _parse(text: str, n_layers: int | None) -> Contender:
    name, _, settings = text.partition(":")
    values: dict[str, int | float | str] = {}
    for part in settings.split(",") if settings else []:
        setting, equals, value = part.partition("=")
        if not equals or not setting.strip():
            raise FastKVError(f"--policy {text}: must be NAME or NAME:setting=value,…; {part!r} is no setting=value")
        values[setting.strip().replace("-", "_")] = _value(value.strip())
    try:
        policy = build_policy(name.strip(), values)
        if n_layers is not None:
            policy.validate(n_layers)
    except FastKVError as error:
        raise FastKVError(f"--policy {text}: {error}") from None
    return Contender(text, policy)


def _value(text: str) -> int | float | str:
    """A number where it is one; the policy itself says whether it fits."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
