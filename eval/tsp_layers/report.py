"""What came of fastkv-eval tsp-layers, in one line and as one JSON object."""

from __future__ import annotations

import argparse
from datetime import date
from typing import Any

from fastkv.console.machine import machine
from fastkv.engine.llm import LLM
from fastkv.eval.tsp_layers.advice import RULE, settled_layers
from fastkv.eval.tsp_layers.importance import Importance
from fastkv.eval.tsp_layers.search import Findings

FORMAT = "fastkv-eval tsp-layers 1"
_NO_FLAGS = ("command", "tasks", "words")  # what is known of a command beyond its flags


def advice_line(found: Findings) -> str:
    """The advice in words, with the flags of fastkv-run."""
    default, advice = found.checked[0].setting, found.advice
    if found.found:
        return (
            f"Advice: --tsp-layer {advice.layer} --tsp-rate {advice.rate:g}. Its prefill has {100 * advice.work:.1f} % "
            f"of the work of a full one; the default, {default.label}, has {100 * default.work:.1f} %."
        )
    tried = len(found.checked) - 1
    why = (
        f"{tried} other settings were run, and none passed"
        if tried
        else "no settled layer has less work at these rates"
    )
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
