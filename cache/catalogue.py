"""Every policy and its settings, as data: what flags, help texts and the docs are made of. Imports no torch.

`python -m fastkv.cache.catalogue` prints the tables of docs/policies.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastkv.cache import policies
from fastkv.cache.policy import Policy
from fastkv.cache.setting import Setting, settings_of

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in vars(policies).values() if isinstance(policy, type) and issubclass(policy, Policy)
}


@dataclass(frozen=True)
class SharedSetting:
    """A setting by its name, as each policy that has it declares it.

    by_policy: from the policy's name, in the order of POLICIES.
    """

    name: str
    by_policy: dict[str, Setting]

    @property
    def read(self) -> Callable[[str], Any]:
        """The value that the text of its flag means: what the first policy takes, which is the most that any does."""
        return self._first.values.read

    @property
    def metavar(self) -> str:
        return self._first.metavar

    @property
    def help(self) -> str:
        """Each text once, after the names of its policies; the default policy's needs none."""
        told: list[str] = []
        for text in dict.fromkeys(one.help for one in self.by_policy.values()):
            alike = {policy: one for policy, one in self.by_policy.items() if one.help == text}
            names = "" if _DEFAULT in alike else f"{', '.join(alike)}: "
            told.append(f"{names}{text}{_defaults(alike)}")
        return "; ".join(told)

    @property
    def _first(self) -> Setting:
        return next(iter(self.by_policy.values()))


_DEFAULT = next(iter(POLICIES))  # the policy whose settings need no word on whose they are


def _defaults(alike: dict[str, Setting]) -> str:
    """` (default 7; gemfilter 5)`: that of the default policy, then the others with the names of their policies."""
    names_of: dict[str, list[str]] = {}
    for policy, one in alike.items():
        names_of.setdefault(one.default, []).append(policy)
    if list(names_of) == [""]:
        return ""
    unnamed = _DEFAULT in alike or len(names_of) == 1
    first, *others = (f"{', '.join(names)} {default}" for default, names in names_of.items())
    return f" (default {'; '.join([next(iter(names_of)) if unnamed else first, *others])})"


def _shared(named: Iterable[tuple[str, type[Policy]]]) -> dict[str, SharedSetting]:
    found: dict[str, SharedSetting] = {}
    for policy, declared in named:
        for name, one in settings_of(declared).items():
            found.setdefault(name, SharedSetting(name, {})).by_policy[policy] = one
    return found


SETTINGS: dict[str, SharedSetting] = _shared(POLICIES.items())


def policy_table() -> str:
    """Markdown: each policy by its name, its class, and the first line of its file."""
    lines = ["| `--policy` | class | |", "|---|---|---|"]
    for name, policy in POLICIES.items():
        _, _, what = (sys.modules[policy.__module__].__doc__ or "").splitlines()[0].partition(": ")
        lines.append(f"| `{name}` | `{policy.__name__}` | {what.rstrip('.')} |")
    return "\n".join(lines)


def setting_table() -> str:
    """Markdown: each setting with the policies that have it, their default, and what it is for."""
    lines = ["| setting | policies | default | |", "|---|---|---|---|"]
    for shared in SETTINGS.values():
        alike: dict[tuple[str, str], list[str]] = {}
        for policy, one in shared.by_policy.items():
            alike.setdefault((one.default, one.help), []).append(policy)
        for (default, help), names in alike.items():
            lines.append(f"| `{shared.name}` | {_listed(names)} | {default or '–'} | {help} |")
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    """The names, or of nearly all policies those that are missing."""
    missing = [name for name in POLICIES if name not in names]
    return ", ".join(names) if len(missing) > len(POLICIES) / 4 else f"all but {', '.join(missing)}"


if __name__ == "__main__":
    print(policy_table(), setting_table(), sep="\n\n")
