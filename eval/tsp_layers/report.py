"""What came of fastkv-eval tsp-layers: as Markdown, as the line of the advice, and as one JSON object."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date
from typing import Any

from fastkv.console.machine import machine
from fastkv.console.markdown import markdown
from fastkv.engine.llm import LLM
from fastkv.eval.statistics import mean_estimate, paired_estimate
from fastkv.eval.table import percent, points
from fastkv.eval.tsp_layers.advice import RULE, Checked, Findings, settled_layers
from fastkv.eval.tsp_layers.check import Result
from fastkv.eval.tsp_layers.importance import Importance

FORMAT = "fastkv-eval tsp-layers 1"
_NO_FLAGS = ("command", "tasks", "words")  # what is known of a command beyond its flags
NOTE = """\
Of each layer's choice, the tokens that TSP there would propagate at that rate, in %, means over the prompts.
overlap: how many of them a later layer would choose too, the mean over the later layers (and the lowest of them).
coverage: the share of a later layer's scores that falls on them, likewise.
attained: what they cover of the later layers between as many tokens at random (0) and those layers' own choices (100);
* settled. The observation window, which is always propagated, counts nowhere.
"""

ANSWERS = "Right answers in %, by the rules of the tasks. "
CONTINUATIONS = """\
Of the full cache's greedy tokens, the share in % before the first one that differs; KL(full ‖ setting) of the next
token. Means over the prompts. """
CHECK_NOTE = """\
Differences in points over the same prompts; 95 % confidence intervals.
A setting that is clearly lower than the default is stopped there. Work: a prefill's operations, counted.
"""


def importance_tables(importance: Importance) -> str:
    """Three tables, layers down and rates across, and what they mean."""
    tables = {what: _over_later(importance, what) for what in ("overlap", "coverage")}
    settled = [settled_layers(shares) for shares in importance.attained.tolist()]
    tables["attained"] = [
        [f"{100 * share:.0f}{' *' * (layer in settled[rate])}" for rate, share in enumerate(of_layer)]
        for layer, of_layer in enumerate(importance.attained.T.tolist())
    ]
    rates, parts = [f"rate {rate:g}" for rate in importance.rates], []
    for title, cells in tables.items():
        parts.append(markdown([title, *rates], [[f"layer {layer}", *row] for layer, row in enumerate(cells)]))
    return "\n".join([*parts, NOTE])


def later(importance: Importance, rate: int, layer: int, what: str) -> list[float]:
    """Overlap or coverage of `layer`'s choice at the rate of that index, for each layer after it."""
    values: list[float] = getattr(importance, what)[rate, layer, layer + 1 :].tolist()
    return values


def check_table(full: Result, checked: Sequence[Checked]) -> str:
    """A row for the full cache and for each setting, the default first, and what the numbers are."""
    groups = list(full.scores)
    diverging = bool(full.divergence)
    header = ["setting", "prefill work", *groups, *(["all"] if len(groups) > 1 else []), "against the default"]
    header += [*(["KL, nats"] if diverging else []), "verdict"]
    default = checked[0].result
    rows = [_check_row("full cache", 1.0, full, default, groups, "")]
    rows += [
        _check_row(one.setting.label, one.setting.work, one.result, default, groups, one.verdict) for one in checked
    ]
    return f"{markdown(header, rows)}\n{CONTINUATIONS if diverging else ANSWERS}{CHECK_NOTE}"


def _over_later(importance: Importance, what: str) -> list[list[str]]:
    cells = []
    for layer in range(importance.attained.shape[1]):
        of_rates = [later(importance, rate, layer, what) for rate in range(len(importance.rates))]
        cells.append([f"{100 * sum(some) / len(some):.0f} ({100 * min(some):.0f})" for some in of_rates])
    return cells


def _check_row(
    label: str, work: float, result: Result, default: Result, groups: Sequence[str], verdict: str
) -> list[str]:
    row = [label, f"{100 * work:.1f} %"]
    row += [f"{100 * sum(of) / len(of):.1f}" if (of := result.scores.get(group)) else "–" for group in groups]
    row += ["–"] * (1 + (len(groups) > 1))
    if len(result.scores) == len(groups):
        row[-2] = percent(mean_estimate(result.all_scores))
        if result is not default:
            row[-1] = points(paired_estimate(result.all_scores, default.all_scores))
    if result.divergence:
        row.append(f"{sum(result.divergence) / len(result.divergence):.4g}")
    return [*row, verdict]


def advice_line(found: Findings) -> str:
    """The advice in words, with the flags of fastkv-run."""
    default, advice = found.checked[0].setting, found.advice
    if found.found:
        return (
            f"Advice: --tsp-layer {advice.layer} --tsp-rate {advice.rate:g}. Its prefill has {100 * advice.work:.1f} % "
            f"of the work of a full one; the default, {default.label}, has {100 * default.work:.1f} %."
        )
    tried, none = len(found.checked) - 1, "no settled layer has less work at these rates"
    why = f"{tried} other setting{'s' if tried > 1 else ''} tried, and none passed" if tried else none
    return f"Advice: keep the default, --tsp-layer {default.layer} --tsp-rate {default.rate:g}: {why}."


def report(
    args: argparse.Namespace, llm: LLM, lengths: list[int], importance: Importance, found: Findings
) -> dict[str, Any]:
    """The JSON object: the command (its flags by name), the machine, the measurement, the check and the advice."""
    given = {name: value for name, value in vars(args).items() if value is not None and name not in _NO_FLAGS}
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "command": given,
        **machine(llm),
        "prompt_tokens": lengths,
        "rates": importance.rates,
        "overlap": importance.overlap.tolist(),
        "coverage": importance.coverage.tolist(),
        "attained": importance.attained.tolist(),
        "settled": [settled_layers(shares) for shares in importance.attained.tolist()],
        "rule": RULE,
        "full": vars(found.full),
        "checked": [
            {"layer": one.setting.layer, "rate": one.setting.rate, "prefill_work": one.setting.work}
            | {"verdict": one.verdict, **vars(one.result)}
            for one in found.checked
        ],
        "advice": {"tsp_layer": found.advice.layer, "tsp_rate": found.advice.rate, "is_default": not found.found},
    }
