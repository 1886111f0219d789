"""What came of fastkv-eval tsp-layers, in one line and as one JSON object."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkv import __version__
from fastkv.errors import FastKVError
from fastkv.eval.layer_advice import RULE, settled_layers

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM
    from fastkv.eval.layer_importance import Importance
    from fastkv.eval.layer_search import Findings

FORMAT = "fastkv-eval tsp-layers 1"


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
    command: dict[str, Any], llm: LLM, lengths: list[int], importance: Importance, found: Findings
) -> dict[str, Any]:
    """The JSON object: `command` (its flags by name), the machine, the measurement, the check and the advice."""
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        "command": {name: value for name, value in command.items() if value is not None},
        "fastkv": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else str(llm.device),
        "dtype": str(llm.dtype).removeprefix("torch."),
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """FastKVError where it cannot be written."""
    try:
        path.write_text(json.dumps(content, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise FastKVError(f"--json {path}: cannot be written ({error.strerror})") from None
