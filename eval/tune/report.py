"""What fastkv-eval tune prints: what was tried, what it is worth on needles of its own, and the flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastkv.cache.policies import FastKV
from fastkv.console.markdown import markdown
from fastkv.console.parser import flag_of
from fastkv.console.policy_text import write_settings
from fastkv.eval.statistics import mean_estimate
from fastkv.eval.tune.search import Tried


@dataclass(frozen=True)
class Outcome:
    """What was found. loss: in points of 100. tokens: of the longest prompt.

    tuned, defaults: 1 for each held-out needle that was found, 0 for each that was lost.
    """

    settings: dict[str, Any]
    loss: float
    needles: int
    asked: int
    tokens: int
    chosen_on: int
    tried: Sequence[Tried]
    tuned: Sequence[float]
    defaults: Sequence[float]


def report(outcome: Outcome) -> str:
    flags = " ".join(f"{flag_of(name)} {value:g}" for name, value in outcome.settings.items())
    return "\n".join(
        [
            f"Prompts of up to {outcome.tokens:,} tokens. Of {outcome.asked} needles the full cache finds "
            f"{outcome.needles}: these count.\n",
            markdown(["TSP", "reach", "KV retention", "needles", "lost"], _rows(outcome.tried)),
            f"The needles above chose the settings. Of {len(outcome.tuned)} others, full cache 100 %:\n",
            f"tuned      {_score(outcome.tuned)}",
            f"defaults   {_score(outcome.defaults)}",
            *_warning(outcome),
            "",
            f"fastkv-run {flags}",
            f"fastkv-eval --policy {write_settings('fastkv', outcome.settings)}",
        ]
    )


def tsp(policy: FastKV) -> str:
    """Its TSP layer and rate in words."""
    return "off" if policy.tsp_rate == 1 else f"layer {policy.tsp_layer}, rate {policy.tsp_rate}"


def _rows(tried: Sequence[Tried]) -> list[list[str]]:
    return [
        [
            tsp(one.policy),
            str(one.policy.reach),
            f"{one.policy.kv_retention:g}",
            str(one.run),
            str(one.lost),
        ]
        for one in tried
    ]


def _score(found: Sequence[float]) -> str:
    estimate = mean_estimate(found)
    return f"{100 * estimate.mean:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _warning(outcome: Outcome) -> list[str]:
    lost = 100 - 100 * mean_estimate(outcome.tuned).mean
    if lost <= outcome.loss:
        return []
    return [
        f"That is more than the {outcome.loss:g} points allowed: more --examples choose more surely, and a higher "
        "--kv-retention keeps more."
    ]
