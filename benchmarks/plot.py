"""Draw a result of latency.py: time to first token and tokens/s against the context length.

    python benchmarks/plot.py RESULT.json OUT.png

One row of panels for each batch; a line for each policy through its medians, with bars from the lowest to the
highest run. Knows no engine: it reads what was measured and measures nothing.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.parser import Parser, guarded
from fastkv.console.picture import check_picture, legend_below, save_picture, style
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

WIDTH, HEIGHT, TITLE = 10.0, 3.8, 0.7  # inches: of a row of panels, and of what stands above


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the PNG of a result, as latency.py makes it."""
    save_picture(figure_of(result), path, "plot")


def figure_of(result: dict[str, Any]) -> Figure:
    """The panels: a row for each batch, time to first token on the left and decoding on the right."""
    from matplotlib.figure import Figure

    rows: list[Row] = result["rows"]
    batches = sorted({batch_of(row) for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(WIDTH, TITLE + HEIGHT * len(batches)))
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
    grid = figure.subplots(len(batches), 2, squeeze=False)
    for (left, right), batch in zip(grid, batches, strict=True):
        shown = [row for row in rows if batch_of(row) == batch]
        suffix = f" (batch {batch})" if len(batches) > 1 or batch > 1 else ""
        _panel(left, shown, names, "ttft_s", "ttft_range")
        left.set_ylabel(f"time to first token, s{suffix}")
        _time_axis(left, shown, "ttft_range")
        _panel(right, shown, names, "decode_tokens_per_s", "decode_range")
        right.set_ylabel(f"decoding, tokens/s{suffix}")
        right.set_ylim(bottom=0)
    _title(figure, result, grid[0][0])
    return figure


def batch_of(row: Row) -> int:
    """Results of before there were batches do not say it."""
    return int(row.get("batch", 1))


def _panel(axes: Axes, rows: list[Row], names: list[str], key: str, span: str) -> None:
    """One figure of every policy against the context length."""
    for index, name in enumerate(names):
        colour, marker = style(index)
        line = sorted((row for row in rows if row["name"] == name), key=lambda row: row["context"])
        contexts, medians = [row["context"] for row in line], [row[key] for row in line]
        below = [row[key] - row[span][0] for row in line]
        above = [row[span][1] - row[key] for row in line]
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.6,
            "capsize": 3,
            "label": name,
        }
        axes.errorbar(contexts, medians, yerr=[below, above], **look)
    _context_axis(axes, sorted({row["context"] for row in rows}))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _context_axis(axes: Axes, contexts: list[int]) -> None:
    """Base 2, a tick for each length that was measured, but for those that would stand on each other's labels."""
    axes.set_xscale("log", base=2)
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])
    margin = 0.06 * (high - low) if high > low else 0.5
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    ticks: list[int] = []
    for context in contexts:
        if not ticks or math.log2(context / ticks[-1]) >= margin:
            ticks.append(context)
    axes.set_xticks(ticks, [_length(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("context length, tokens (1K = 1,024)")


def _time_axis(axes: Axes, rows: list[Row], span: str) -> None:
    """Logarithmic, as the contexts are: work in proportion to the context is a straight line.

    From one round figure (1, 2 or 5 at the front) to another, so that there are two labels at least.
    """
    lowest, highest = min(row[span][0] for row in rows), max(row[span][1] for row in rows)
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 2)
    figures = [float(f"{front}e{power}") for power in powers for front in (1, 2, 5)]
    low = max(figure for figure in figures if figure <= lowest)
    high = min(figure for figure in figures if figure > highest)
    ticks = [figure for figure in figures if low <= figure <= high]
    if len(ticks) > 10:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _title(figure: Figure, result: dict[str, Any], axes: Axes) -> None:
    """What was measured and where, above all panels, and the policies below."""
    title = f"{result['model']}, {result['dtype']} on {result['device']}, {result['date']}"
    figure.suptitle(title, fontsize=11)
    legend_below(figure, axes)


def _length(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def read_result(path: Path) -> dict[str, Any]:
    """A result that latency.py wrote; FastKVError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise FastKVError(f"{path}: is no JSON file; plot.py draws what latency.py --json wrote") from None
    needed = {"context", "name", "ttft_s", "ttft_range", "decode_tokens_per_s", "decode_range"}
    rows = result.get("rows") if isinstance(result, dict) else None
    whole = isinstance(rows, list) and rows and all(isinstance(row, dict) and needed <= row.keys() for row in rows)
    if not whole or not {"model", "dtype", "device", "date"} <= result.keys():
        raise FastKVError(f"{path}: is no result of latency.py --json, or holds no rows")
    return dict(result)


def _main(argv: Sequence[str] | None) -> None:
    made = Parser(prog="plot.py", description="Draw a result of latency.py --json.")
    made.add_argument("result", type=Path, metavar="RESULT.json")
    made.add_argument("picture", type=Path, metavar="OUT.png")
    args = made.parse_args(argv)
    check_picture(args.picture, "picture", "bench")
    result = read_result(args.result)
    draw(result, args.picture)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    return guarded("plot.py", lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
