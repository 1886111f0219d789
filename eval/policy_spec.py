"""The policies of a run."""

from __future__ import annotations

from dataclasses import dataclass

from fastkv.cache.policy import Policy
from fastkv.console.policy_text import build_policy, read_settings
from fastkv.errors import FastKVError, cut, writable


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
            spec = PolicySpec(writable(text), build_policy(*read_settings(text)))
            if n_layers is not None:
                spec.policy.validate(n_layers)
            check_twin(spec, found)
        except FastKVError as error:
            raise FastKVError(f"--policy {cut(text, 200)}: {error}") from None
        found.append(spec)
    return found


def check_twin(spec: PolicySpec, others: list[PolicySpec]) -> None:
    """FastKVError where one of the others is the very same policy."""
    twin = next((other for other in others if other.policy == spec.policy), None)
    if twin is not None:
        raise FastKVError(f"is the same policy as {cut(twin.title or twin.label, 200)}; leave one of them out")
