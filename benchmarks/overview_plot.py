"""Draw the picture of the README: speed and accuracy of the full cache and of FastKV, from results in this repository.

    python benchmarks/overview_plot.py GPU.json ACCURACY.md OUT.png

GPU.json: a file of gpu_suite.py with the steps first-128k and decode. ACCURACY.md: a page whose first table is one of
`fastkv-eval` with the policies full and FASTKV (below). Measures nothing. Needs matplotlib (extra `bench`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpu_table import Figure, done, read_result, words

if TYPE_CHECKING:
    from matplotlib import figure
    from matplotlib.axes import Axes

FULL, FASTKV = "full", "fastkv:min_tokens=8"
COLOURS = {
    "full": "#767676",
    "fastkv": "#0072B2",
}  # told apart by people with any colour vision, and readable under white
NAMES = {"full": "full cache", "fastkv": "FastKV, 10 % of the cache"}
CONTEXT = 131_072
SCORE = re.compile(r"([\d.]+) \(([\d.]+) – ([\d.]+)\)")


class Score(NamedTuple):
    """Right answers in %, and the 95 % confidence interval."""

    value: float
    low: float
    high: float


def speeds(result: Figure) -> dict[str, dict[str, float]]:
    """For each policy: seconds to the first token and tokens/s of one sequence, both at 128K."""
    found: dict[str, dict[str, float]] = {"full": {}, "fastkv": {}}
    for each in done(result, "first-128k", "decode"):
        if each["context"] == CONTEXT and each.get("batch", 1) == 1:
            key = "tokens_per_s" if each["step"] == "decode" else "ttft_s"
            found[words(each)[0]][key] = each[key]
    if any(len(values) < 2 for values in found.values()):
        raise ValueError(f"the GPU file lacks the first token or decoding of both policies at {CONTEXT:,} tokens")
    return found


def scores(page: str) -> dict[str, dict[str, Score]]:
    """For each policy: the score of each prompt length, and of "all"."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    header = rows[0]
    if not {"tokens", FULL, FASTKV} <= set(header):
        raise ValueError(f"the first table of the accuracy file has no columns tokens, {FULL} and {FASTKV}")
    found: dict[str, dict[str, Score]] = {"full": {}, "fastkv": {}}
    for row in rows[2:]:
        if len(row) != len(header):
            break  # the next table
        for name, column in (("full", FULL), ("fastkv", FASTKV)):
            match = SCORE.fullmatch(row[header.index(column)])
            if match is None:
                raise ValueError(f"the accuracy file has no score with its interval in column {column}")
            found[name][row[header.index("tokens")]] = Score(*map(float, match.groups()))
    return found


def figure_of(result: Figure, page: str) -> figure.Figure:
    """Three panels: first token, decoding, accuracy."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 3.6), dpi=160)
    canvas.set_layout_engine("constrained", wspace=0.08)
    first, decoding, accuracy = canvas.subplots(1, 3, width_ratios=(1, 1, 2.3))
    speed = speeds(result)
    _bars(first, {name: values["ttft_s"] for name, values in speed.items()}, "{:.1f} s", less_is_better=True)
    first.set(title="Time to the first token", ylabel="seconds (lower is better)")
    _bars(decoding, {name: values["tokens_per_s"] for name, values in speed.items()}, "{:.0f}", less_is_better=False)
    decoding.set(title="Decoding speed", ylabel="tokens/s (higher is better)")
    device = str(result["device"]).removeprefix("NVIDIA ")
    for panel in (first, decoding):
        panel.set_xlabel(f"prompt of 128K tokens\n8B model (random weights), {device}")
    _accuracy(accuracy, scores(page))
    handles, labels = accuracy.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return canvas


def _bars(panel: Axes, values: dict[str, float], text: str, *, less_is_better: bool) -> None:
    """A bar for each policy with its figure; FastKV's says how many times as fast it is."""
    for index, (name, value) in enumerate(values.items()):
        panel.bar(index, value, 0.7, color=COLOURS[name])
        label = text.format(value)
        if name == "fastkv":
            ratio = values["full"] / value if less_is_better else value / values["full"]
            label += f"\n{ratio:.1f}× as fast"
        look = {"ha": "center", "va": "bottom", "fontsize": 10, "linespacing": 1.3}
        above = panel.annotate(label, (index, value), (0, 3), textcoords="offset points", **look)
        above.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # no grid line through the figures
    panel.set_xticks(range(len(values)), ["full", "FastKV"])
    panel.set_ylim(0, 1.22 * max(values.values()))
    _plain(panel)


def _accuracy(panel: Axes, found: dict[str, dict[str, Score]]) -> None:
    """Bars in pairs, a pair for each length, with their confidence intervals."""
    for index, (name, by_length) in enumerate(found.items()):
        places = [place + 0.4 * (index - 0.5) for place in range(len(by_length))]
        values = [score.value for score in by_length.values()]
        spans = [
            [score.value - score.low for score in by_length.values()],
            [score.high - score.value for score in by_length.values()],
        ]
        panel.bar(places, values, 0.38, color=COLOURS[name], label=NAMES[name])
        panel.errorbar(places, values, yerr=spans, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for place, value in zip(places, values, strict=True):
            panel.text(place, 2, f"{value:.1f}", ha="center", va="bottom", fontsize=8.5, color="white")
    panel.set_xticks(range(len(found["full"])), list(found["full"]))
    panel.set(title="Right answers", ylabel="% (higher is better)", ylim=(0, 104))
    panel.set_xlabel("prompt, tokens\nbundled model, archive task; lines: 95 % confidence")
    _plain(panel)


def _plain(panel: Axes) -> None:
    panel.grid(axis="y", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=10)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 a user's mistake."""
    made = argparse.ArgumentParser(prog="overview_plot.py", description="Draw the picture of the README.")
    made.add_argument("result", type=Path, metavar="GPU.json", help="a result of gpu_suite.py")
    made.add_argument(
        "accuracy", type=Path, metavar="ACCURACY.md", help="a page that begins with a table of fastkv-eval"
    )
    made.add_argument("picture", type=Path, metavar="OUT.png")
    args = made.parse_args(argv)
    try:
        drawn = figure_of(read_result(args.result), args.accuracy.read_text(encoding="utf-8"))
        drawn.savefig(args.picture, format="png")
    except ImportError:
        print("overview_plot.py: error: the picture needs matplotlib: pip install 'fastkv[bench]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"overview_plot.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
