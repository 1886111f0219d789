"""The results as pictures: needle heat maps, and accuracy against what was kept and how fast it went.

Needs matplotlib, the extra `eval`. Drawn without a display. Like the tables, the pictures count the examples that every
policy has answered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from fastkv.errors import FastKVError
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate
from fastkv.eval.table import Answers, answered_by_all, kept_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DPI = 150
WIDEST = 12  # inches that heat maps side by side may take
COLOURS = (
    *("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#8c564b", "#7b3fbf", "#a3a500", "#8a8a8a", "#c2003f"),
)
MARKERS = "osD^vPX*<>hp"
AGAINST = ("KV entries kept, %", "time to first token, s (median)", "decoding, tokens/s (median)")
LEGEND_WIDTH = 110  # characters side by side in the legend
DARK_BELOW = 0.55  # scores whose cell is so dark that it is labelled in white


def check_matplotlib() -> None:
    """FastKVError where matplotlib cannot be imported: better before a long run than behind it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise FastKVError('--plots needs matplotlib: pip install "fastkv[eval]"') from None


def check_folder(folder: Path) -> None:
    """FastKVError unless pictures can be put there: found out before a long run, too."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise FastKVError(f"--plots {folder}: {there} is no folder; name another one")
    if not os.access(there, os.W_OK):
        raise FastKVError(f"--plots {folder}: the folder {there} cannot be written to")


def draw_plots(records: Sequence[Record], labels: Sequence[str], folder: Path) -> list[Path]:
    """Write the PNG files into `folder`; their paths. Nothing is drawn of what no example tells."""
    answers = answered_by_all(records, labels)
    if not answers:
        return []
    names = {label: label for label in labels}
    figures = {f"needle-{task}.png": heat_maps(answers, names, task) for task in needle_tasks(answers)}
    figures["accuracy.png"] = accuracy(answers, {label: [label] for label in labels})
    return save(figures, folder)


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write the figures as PNG files of these names; their paths. FastKVError where they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=DPI)
    except OSError as error:
        raise FastKVError(f"--plots {folder}: cannot be written ({error.strerror})") from None
    return [folder / name for name in figures]


def needle_tasks(answers: Answers) -> list[str]:
    """The tasks whose needle lies at given depths."""
    records = [next(iter(example.values())) for example in answers.values()]
    return sorted({record.task for record in records if record.depth is not None})


def heat_maps(answers: Answers, names: dict[str, str], task: str) -> Figure:
    """A map for each policy: length to the right, depth downwards, mean score as colour and number.

    names: what stands above the map of each label.
    """
    from matplotlib.figure import Figure

    labels = list(names)
    of_task = [example for example in answers.values() if example[labels[0]].task == task]
    n_lengths = len({example[labels[0]].length for example in of_task})
    n_depths = len({example[labels[0]].depth for example in of_task})
    width, height = max(2.9, 0.6 * n_lengths + 0.8), max(2.4, 0.3 * n_depths + 1.3)
    columns = min(len(labels), max(1, int(WIDEST // width)))
    rows = -(-len(labels) // columns)
    size = (columns * width + 1, rows * height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(labels) :]:
        axes.remove()
    images = [
        _heat_map(axes, [example[label] for example in of_task], name)
        for axes, (label, name) in zip(grid.flat, names.items(), strict=False)
    ]
    for index, axes in enumerate(grid.flat[: len(labels)]):
        if index + columns >= len(labels):
            axes.set_xlabel("prompt, tokens")
            axes.tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel("depth of the needle, %")
    figure.colorbar(images[0], ax=list(grid.flat[: len(labels)]), label="score, %", fraction=0.04, pad=0.02)
    figure.suptitle(f"{task}: {_examples_a_cell(of_task, labels)} a cell", fontsize=11)
    return figure


def _heat_map(axes: Axes, records: Sequence[Record], name: str) -> AxesImage:
    lengths = sorted({record.length for record in records if record.length is not None})
    depths = sorted({record.depth for record in records if record.depth is not None})
    cells = [
        [[r.score for r in records if (r.depth, r.length) == (depth, length)] for length in lengths] for depth in depths
    ]
    means = [[fmean(cell) if cell else float("nan") for cell in row] for row in cells]
    image = axes.imshow(
        [[100 * mean for mean in row] for row in means], cmap="viridis", vmin=0, vmax=100, aspect="auto"
    )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    axes.set_title(_wrapped(name), fontsize=9)
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            if mean == mean:
                colour = "white" if mean < DARK_BELOW else "black"
                axes.text(x, y, f"{100 * mean:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def _examples_a_cell(examples: Sequence[dict[str, Record]], labels: Sequence[str]) -> str:
    sizes: dict[tuple[int | None, float | None], int] = {}
    for example in examples:
        record = example[labels[0]]
        sizes[record.length, record.depth] = sizes.get((record.length, record.depth), 0) + 1
    low, high = min(sizes.values()), max(sizes.values())
    return f"{low} examples" if low == high != 1 else "1 example" if high == 1 else f"{low} to {high} examples"


def accuracy(
    answers: Answers, series: dict[str, Sequence[str]], against: Sequence[str] = AGAINST, *, crowded: bool = False
) -> Figure:
    """Mean score, with its confidence interval, against the share of KV kept and against both speeds.

    series: labels by the name that they have in the picture; those of one name are joined by a line where it
    tells of the KV kept. against: the panels, of AGAINST. crowded: hollow marks without intervals, which can be told
    apart where they lie on each other, and shares of the KV from decade to decade.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = dict(zip(against, figure.subplots(1, len(against), sharey=True, squeeze=False)[0], strict=True))
    for index, (name, labels) in enumerate(series.items()):
        groups = [_records(answers, label) for label in labels]
        scores = [mean_estimate([record.score for record in records]) for records in groups]
        below = [100 * (score.mean - score.low) for score in scores]
        above = [100 * (score.high - score.mean) for score in scores]
        colour, marker = style(index)
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "label": name, "linewidth": 1}
        look |= {"fillstyle": "none", "markersize": 9, "markeredgewidth": 1.6} if crowded else {"elinewidth": 1.5}
        for title, axes in panels.items():
            places = [_place(records, title) for records in groups]
            joined = "-" if len(labels) > 1 and title == AGAINST[0] else "none"
            bars = None if crowded else [below, above]
            axes.errorbar(places, [100 * score.mean for score in scores], yerr=bars, linestyle=joined, **look)
    for title, axes in panels.items():
        axes.set_xlabel(title)
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    if crowded and AGAINST[0] in panels:
        _spread(
            panels[AGAINST[0]], [_place(_records(answers, label), AGAINST[0]) for of in series.values() for label in of]
        )
    _finish(figure, panels[against[0]], "mean score, %" if crowded else "mean score, %, with 95 % interval")
    tasks = sorted({next(iter(example.values())).task for example in answers.values()})
    figure.suptitle(f"{', '.join(tasks)}: {len(answers)} examples for each policy", fontsize=11)
    return figure


def _spread(axes: Axes, shares: Sequence[float]) -> None:
    """Shares in proportion to each other, with a label for each that there is, to half a per cent."""
    ticks = sorted({round(2 * share) / 2 for share in shares})
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 1.2, 120)
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _finish(figure: Figure, first: Axes, title: str) -> None:
    """What the panels have in common: the scale of the scores on the first one, and the legend below."""
    first.set_ylabel(title)
    first.set_ylim(-4, 104)
    handles, names = first.get_legend_handles_labels()
    columns = max(1, min(len(names), 6, LEGEND_WIDTH // (max(map(len, names)) + 6)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _records(answers: Answers, label: str) -> list[Record]:
    return [example[label] for example in answers.values()]


def style(index: int) -> tuple[str, str]:
    """Colour and marker of a policy by its place: the first twelve share neither, and no two share both for long."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _place(records: Sequence[Record], title: str) -> float:
    """Where a policy stands in the panel of that title; NaN where no answer tells."""
    if title == AGAINST[0]:
        return 100 * kept_share(records)
    if title == AGAINST[1]:
        return median(record.ttft_s for record in records)
    speeds = [record.decode_tokens_per_s for record in records if record.decode_tokens_per_s is not None]
    return median(speeds) if speeds else float("nan")


def _wrapped(label: str) -> str:
    """A label over several lines: a setting each."""
    return label.replace(":", ":\n", 1).replace(",", ",\n")
