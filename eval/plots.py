"""The results as pictures: needle heat maps, and accuracy against what was kept and how fast it went.

Needs matplotlib, the extra `eval`. Drawn without a display. Like the tables, the pictures count the examples that every
policy has answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fastkv.console.picture import legend_below, save_pictures, style
from fastkv.eval import table as tables
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate
from fastkv.eval.table import Answers

WIDEST = 12  # inches that heat maps next to each other may take
KEPT = "KV entries kept, %"
AGAINST: dict[str, Callable[[Sequence[Record]], float]] = {
    KEPT: lambda records: 100 * tables.kept_share(records),
    "time to first token, s (median)": tables.median_ttft,
    "decoding, tokens/s (median)": tables.median_speed,
}
LEGEND_WIDTH = 110  # characters next to each other in the legend
DARK_BELOW = 0.55  # scores whose cell is so dark that it is labelled in white


def draw_plots(records: Sequence[Record], labels: Sequence[str], folder: Path) -> list[Path]:
    """Write the PNG files into `folder`; their paths. Nothing is drawn of what no example tells."""
    answers = tables.answered_by_all(records, labels)
    if not answers:
        return []
    names = {label: label for label in labels}
    figures = {f"needle-{task}.png": heat_maps(answers, names, task) for task in needle_tasks(answers)}
    figures["accuracy.png"] = accuracy(answers, {label: [label] for label in labels}, list(AGAINST))
    return save_pictures(figures, folder, "plots")


def needle_tasks(answers: Answers) -> list[str]:
    """The tasks whose needle lies at given depths."""
    return sorted({one.task for example in answers for one in example.values() if one.depth is not None})


def heat_maps(answers: Answers, names: dict[str, str], task: str) -> Figure:
    """A map for each policy: length to the right, depth downwards, mean score as colour and number.

    names: what stands above the map of each label.
    """
    of_task = tables.grouped(answers, "task")[task]
    n_lengths, n_depths = len(tables.grouped(of_task, "length")), len(tables.grouped(of_task, "depth"))
    width, height = max(2.9, 0.6 * n_lengths + 0.8), max(2.4, 0.3 * n_depths + 1.3)
    columns = min(len(names), max(1, int(WIDEST // width)))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(columns * width + 1, rows * height + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    maps = list(grid.flat[: len(names)])
    for index, (axes, (label, name)) in enumerate(zip(maps, names.items(), strict=True)):
        image = _heat_map(axes, tables.records_of(of_task, label), name)
        if index + columns >= len(names):
            axes.set_xlabel("prompt, tokens")
            axes.tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel("depth of the needle, %")
    figure.colorbar(image, ax=maps, label="score, %", fraction=0.04, pad=0.02)
    sizes = Counter((record.length, record.depth) for record in tables.records_of(of_task, next(iter(names)))).values()
    low, high = min(sizes), max(sizes)
    count = f"{low} to {high}" if low < high else str(high)
    figure.suptitle(f"{task}: {count} example{'s' * (high > 1)} a cell", fontsize=11)
    return figure


def _heat_map(axes: Axes, records: Sequence[Record], name: str) -> AxesImage:
    lengths = sorted({record.length for record in records if record.length is not None})
    depths = sorted({record.depth for record in records if record.depth is not None})
    cells = [
        [[r.score for r in records if (r.depth, r.length) == (depth, length)] for length in lengths] for depth in depths
    ]
    means = [[fmean(cell) if cell else float("nan") for cell in row] for row in cells]
    shares = [[100 * mean for mean in row] for row in means]
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    axes.set_title(name.replace(":", ":\n", 1).replace(",", ",\n"), fontsize=9)  # a setting on each line
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            if mean == mean:
                colour = "white" if mean < DARK_BELOW else "black"
                axes.text(x, y, f"{100 * mean:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def accuracy(
    answers: Answers, series: dict[str, Sequence[str]], against: Sequence[str], *, crowded: bool = False
) -> Figure:
    """Mean score, with its confidence interval, against the share of KV kept and against both speeds.

    series: labels by the name that they have in the picture; those of one name are joined by a line where it
    tells of the KV kept. against: the panels, of AGAINST. crowded: hollow marks without intervals, which can be told
    apart where they lie on each other, and shares of the KV from decade to decade.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = dict(zip(against, figure.subplots(1, len(against), sharey=True, squeeze=False)[0], strict=True))
    for index, (name, labels) in enumerate(series.items()):
        colour, marker = style(index)
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "label": name, "linewidth": 1}
        look |= {"fillstyle": "none", "markersize": 9, "markeredgewidth": 1.6} if crowded else {"elinewidth": 1.5}
        scores = [mean_estimate(tables.scores_of(answers, label)) for label in labels]
        bars = [[100 * (one.mean - one.low) for one in scores], [100 * (one.high - one.mean) for one in scores]]
        for title, axes in panels.items():
            places = [AGAINST[title](tables.records_of(answers, label)) for label in labels]
            joined = "-" if len(labels) > 1 and title == KEPT else "none"
            means, shown = [100 * one.mean for one in scores], None if crowded else bars
            axes.errorbar(places, means, yerr=shown, linestyle=joined, **look)
    for title, axes in panels.items():
        from_zero(axes, title, 6)
    if crowded and KEPT in panels:  # shares in proportion to each other, with a label for each, to half a per cent
        shares = [AGAINST[KEPT](tables.records_of(answers, label)) for labels in series.values() for label in labels]
        ticks = sorted({round(2 * share) / 2 for share in shares})
        panels[KEPT].set_xscale("log")
        panels[KEPT].set_xlim(min(shares) / 1.2, 120)
        panels[KEPT].minorticks_off()
        panels[KEPT].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    first = panels[against[0]]
    first.set_ylabel("mean score, %" if crowded else "mean score, %, with 95 % interval")
    first.set_ylim(-4, 104)
    columns = max(1, min(len(series), 6, LEGEND_WIDTH // (max(map(len, series)) + 6)))
    legend_below(figure, first, columns)
    tasks = ", ".join(sorted(tables.grouped(answers, "task")))
    figure.suptitle(f"{tasks}: {len(answers)} examples for each policy", fontsize=11)
    return figure


def from_zero(axes: Axes, title: str, ticks: int) -> None:
    """A panel's horizontal axis."""
    axes.set_xlabel(title)
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    axes.locator_params(axis="x", nbins=ticks)
    axes.grid(alpha=0.3)
