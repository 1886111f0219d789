"""Are first token and decode speed what fastkv-plan says? Beside the runs of benchmarks/results; runs no model itself.

    python benchmarks/plan_times.py

The shares of engine/planning/machine.py come from here: they are fitted to these very runs (least squares of the
ratio), so that the ratios say how well a model of two figures each describes them, and nothing of other shapes or
several GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkv.cache.catalogue import POLICIES
from fastkv.engine.planning.expected import decode_step, first_token
from fastkv.engine.planning.machine import MACHINES, Machine, Reached
from fastkv.engine.planning.planned import Planned, Wanted, planned
from fastkv.models.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
FILES = ("2026-11-28-gpu-h200.json", "2026-11-27-gpu-h200-million.json")
CUDNN_ONLY = 16 * 1024  # tokens below which a run with "auto" took other kernels than it takes today


class Run(NamedTuple):
    """A measured run. first: seconds to the first token, step: of a decode step; None where that was not measured."""

    name: str
    plan: Planned
    first: float | None
    step: float | None
    peak: int | None


def runs() -> list[Run]:
    """Those of llama-3.1-8b on one H200, one after another."""
    return [run for file in FILES for run in _runs_of(json.loads((RESULTS / file).read_text())["figures"])]


def _runs_of(figures: list[dict[str, Any]]) -> Iterator[Run]:
    for each in figures:
        if each["status"] != "done" or each["step"] not in ("decode", "first", "first-128k", "million"):
            continue
        if each["step"] == "first" and each["context"] < CUDNN_ONLY and "cudnn" not in each["case"]:
            continue
        policy = "fastkv" if each["step"] == "million" else each["case"].split()[0]
        batch, name = each.get("batch", 1), f"{policy}, {each['context']:,} tokens"
        plan = plan_of(policy, each["context"], len(each.get("intervals_ms", [0])), batch)
        step = None if "step_ms" not in each else each["step_ms"] / 1e3
        peak = None if each["step"] == "decode" else each["peak_bytes"]  # no prompt was read there
        yield Run(f"{name} x {batch}" if batch > 1 else name, plan, each.get("ttft_s"), step, peak)


def plan_of(policy: str, context: int, new_tokens: int, batch: int) -> Planned:
    """Of the shape and dtype that were measured."""
    config, device = PRESETS["llama-3.1-8b"], torch.device("cuda")
    return planned(Wanted(config, POLICIES[policy](), context, torch.bfloat16, device, new_tokens, batch))


def fitted(found: Sequence[Run], machine: Machine) -> Reached:
    """The figures by which the model comes nearest to the runs."""
    ideal = replace(machine, reached=Reached(1, 1, 1, 0, ""))
    steps = [_Row(_step(run.plan, ideal), 0.0, run.step) for run in found if run.step is not None]
    reading, layer_s = _least_squares(steps)
    launching = replace(ideal, reached=replace(ideal.reached, layer_s=layer_s))
    firsts = [_Row(*_first(run.plan, launching), run.first) for run in found if run.first is not None]
    products, attention = (1 / each for each in _least_squares(firsts))
    return Reached(products, attention, 1 / reading, layer_s, "")


def _first(plan: Planned, ideal: Machine) -> tuple[list[float], float]:
    """Seconds of products and attention at the ceiling, and of the layers, as steps told them."""
    parts = first_token(plan, ideal)
    return [parts["products"], parts["attention"]], parts["small kernels"]


def _step(plan: Planned, ideal: Machine) -> list[float]:
    """Seconds of reading at the ceiling, and the layers."""
    parts = decode_step(plan, ideal)
    return [parts["weights"] + parts["entries"], plan.wanted.config.n_layers]


class _Row(NamedTuple):
    """Seconds at the ceiling that have factors, those that have none, and the seconds that were measured."""

    values: list[float]
    fixed: float
    seconds: float


def _least_squares(rows: Sequence[_Row]) -> list[float]:
    """The factors of the values by which each row comes nearest to its seconds, in relation to these."""
    relative = [[value / row.seconds for value in row.values] for row in rows]
    left = [[1 - row.fixed / row.seconds] for row in rows]
    found = torch.linalg.lstsq(*(torch.tensor(each, dtype=torch.float64) for each in (relative, left)))
    return found.solution[:, 0].tolist()  # type: ignore[no-any-return]


def main() -> None:
    """Print the fit, and tables of both."""
    found, machine = runs(), MACHINES["h200"]
    fit = fitted(found, machine)
    print(
        f"fitted: products {fit.products:.3f}, attention {fit.attention:.3f}, reading {fit.reading:.3f}, "
        f"{1e6 * fit.layer_s:.1f} µs a layer\n"
    )
    print("| llama-3.1-8b, one H200 | first token, s: planned | measured | ratio |\n|---|---|---|---|")
    for run in found:
        if run.first is not None:
            told = sum(first_token(run.plan, machine).values())
            print(f"| {run.name} | {told:.3f} | {run.first:.3f} | {told / run.first:.2f} |")
    print("\n| llama-3.1-8b, one H200 | step, ms: planned | measured | ratio |\n|---|---|---|---|")
    for run in found:
        if run.step is not None:
            told = sum(decode_step(run.plan, machine).values())
            print(f"| {run.name} | {1e3 * told:.2f} | {1e3 * run.step:.2f} | {told / run.step:.2f} |")
    print("\n| llama-3.1-8b, one H200 | peak of a prompt, GiB: planned | measured | ratio |\n|---|---|---|---|")
    for run in found:
        if run.peak is not None:
            told, peak = run.plan.total, run.peak
            print(f"| {run.name} | {told / 2**30:.1f} | {peak / 2**30:.1f} | {told / peak:.2f} |")


if __name__ == "__main__":
    main()
