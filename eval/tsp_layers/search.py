"""The search for a TSP layer and rate: the candidates are run one after another until one passes the check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastkv.cache.policies import FullKV
from fastkv.eval.tsp_layers.advice import Setting
from fastkv.eval.tsp_layers.check import Check, Result


@dataclass(frozen=True)
class Checked:
    """A setting that was run; `verdict` says in words what came of it."""

    setting: Setting
    result: Result
    verdict: str


@dataclass(frozen=True)
class Findings:
    """What was run, the default first, and what is advised: the last one, or the default where none passed."""

    full: Result
    checked: list[Checked]
    advice: Setting

    @property
    def found(self) -> bool:
        """Whether the advice is something else than the default."""
        return self.advice is not self.checked[0].setting


def search(check: Check, default: Setting, candidates: Iterable[Setting]) -> Findings:
    """Check `candidates` in order, by the rule of advice.py; the default itself needs no check against itself."""
    full = check.run("full cache", FullKV())
    reference = check.run(f"default ({default.label})", default.policy)
    clearly_lower = full.clearly_higher(reference)
    checked = [Checked(default, reference, "the default" + ", clearly lower than the full cache" * clearly_lower)]
    for one in candidates:
        if (one.layer, one.rate) == (default.layer, default.rate):
            continue
        dearer = one.work >= default.work
        if dearer and not clearly_lower:
            continue
        result = check.run(one.label, one.policy, reference)
        verdict = _verdict(result, reference, dearer)
        checked.append(Checked(one, result, verdict or "advised"))
        if verdict is None:
            return Findings(full, checked, one)
    return Findings(full, checked, default)


def _verdict(result: Result, reference: Result, dearer: bool) -> str | None:
    """Why a candidate does not pass, or None."""
    where = result.worse_than(reference)
    if where is not None:
        return f"worse than the default: {where}"
    if dearer and not result.clearly_higher(reference):
        return "more work, and not clearly higher than the default"
    return None
