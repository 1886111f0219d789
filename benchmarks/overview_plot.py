"""The picture of the README: speed and accuracy of the full cache and of FastKV, from results that are committed.

    python benchmarks/overview_plot.py docs/images/overview.png

Speed: first token and decoding at 128K tokens on a GPU, of a result of gpu_suite.py. Accuracy: the bundled model's
archive task, of a table of fastkv-eval that a result file holds. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkv.console.parser import Parser, check_installed, guarded

RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = {"full": "#8c8c8c", "fastkv": "#0072b2"}  # told apart without colour vision, and in grey
SPECS = {"full": "full", "fastkv": "fastkv:kv_retention=0.1,min_tokens=8"}
LABELS = {"full": "full cache", "fastkv": "FastKV, 10 % kept"}


def speeds(path: Path) -> dict[str, dict[str, float]]:
    """Seconds to the first token and tokens/s of a decode step, at 128K tokens and batch 1, by policy."""
    figures = {(each["step"], each["case"]): each for each in json.loads(path.read_text(encoding="utf-8"))["figures"]}
    return {
        "first token, s": {name: figures["first-128k", f"{name} 128K auto"]["ttft_s"] for name in LABELS},
        "decode, tokens/s": {name: figures["decode", f"{name} 128K x 1"]["tokens_per_s"] for name in LABELS},
    }


def accuracy(path: Path) -> dict[str, dict[str, float]]:
    """Right answers in % by prompt length, of the first table of fastkv-eval with both policies."""
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    columns = next(cells for cells in map(_cells, lines) if {"tokens", *SPECS.values()} <= set(cells))
    places, length = {name: columns.index(spec) for name, spec in SPECS.items()}, columns.index("tokens")
    rows = [
        cells for cells in map(_cells, lines) if len(cells) == len(columns) and cells[length].replace(",", "").isdigit()
    ]
    tokens = [cells[length] for cells in rows]
    first = rows[: next((index for index, each in enumerate(tokens) if each in tokens[:index]), len(rows))]
    return {cells[length]: {name: float(cells[at].split()[0]) for name, at in places.items()} for cells in first}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def draw(speed: dict[str, dict[str, float]], right: dict[str, dict[str, float]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.1), width_ratios=(1, 1, 2.2), layout="constrained")
    for axis, (title, values) in zip(axes, speed.items(), strict=False):
        bars = axis.bar(
            list(LABELS.values()), list(values.values()), color=[COLOURS[name] for name in values], width=0.6
        )
        axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([0, 1], ["full\ncache", "FastKV"])
        axis.margins(y=0.15)
    axes[0].set_xlabel("Llama-3.1-8B shape, 128K tokens, one H200", fontsize=8, loc="left")
    places = range(len(right))
    for shift, name in ((-0.2, "full"), (0.2, "fastkv")):
        heights = [values[name] for values in right.values()]
        bars = axes[2].bar([place + shift for place in places], heights, 0.38, color=COLOURS[name], label=LABELS[name])
        axes[2].bar_label(bars, fmt="%.0f", padding=1, fontsize=8)
    axes[2].set_xticks(list(places), list(right))
    axes[2].set_title("right answers, %, by tokens of the prompt", fontsize=10)
    axes[2].set_xlabel("bundled model (1.7M parameters), archive task, 105 prompts each", fontsize=8)
    axes[2].set_ylim(0, 118)
    axes[2].legend(loc="upper right", fontsize=8, frameon=False, ncols=2)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="overview_plot.py", description="The picture of the README.")
    parser.add_argument("target", type=Path, metavar="FILE.png")
    parser.add_argument("--speed", type=Path, default=RESULTS / "2026-11-27-gpu-h200.json", metavar="FILE.json")
    parser.add_argument("--accuracy", type=Path, default=RESULTS / "2026-11-21-archive-accuracy.md", metavar="FILE.md")
    args: Any = parser.parse_args(argv)
    check_installed("overview_plot.py", "matplotlib", "bench")
    draw(speeds(args.speed), accuracy(args.accuracy), args.target)


if __name__ == "__main__":
    sys.exit(guarded("overview_plot.py", lambda: run(sys.argv[1:])))
