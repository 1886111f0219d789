"""The results as pictures: needle heat maps, and accuracy against what was kept and how fast it went.

Needs matplotlib, the extra `eval`. Drawn without a display. Like the tables, the pictures count the examples that every
policy has answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

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
COLOURS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
MARKERS = "osD^vPX*"
DARK_BELOW = 0.55  # scores whose cell is so dark that it is labelled in white


def check_matplotlib() -> None:
    """FastKVError where matplotlib cannot be imported: better before a long run than behind it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise FastKVError('--plots needs matplotlib: pip install "fastkv[eval]"') from None


def draw_plots(records: Sequence[Record], labels: Sequence[str], folder: Path) -> list[Path]:
    """Write the PNG files into `folder`; their paths. Nothing is drawn of what no example tells."""
    answers = answered_by_all(records, labels)
    if not answers:
        return []
    with_depth = {e[labels[0]].task for e in answers.values() if e[labels[0]].depth is not None}
    figures = {f"needle-{task}.png": _heat_maps(answers, labels, task) for task in sorted(with_depth)}
    figures["accuracy.png"] = _accuracy(answers, labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=DPI)
    except OSError as error:
        raise FastKVError(f"--plots {folder}: cannot be written ({error.strerror})") from None
    return [folder / name for name in figures]


def _heat_maps(answers: Answers, labels: Sequence[str], task: str) -> Figure:
    """A map for each policy: length to the right, depth downwards, mean score as colour and number."""
    from matplotlib.figure import Figure

    of_task = [example for example in answers.values() if example[labels[0]].task == task]
    n_lengths = len({example[labels[0]].length for example in of_task})
    n_depths = len({example[labels[0]].depth for example in of_task})
    width, height = max(3.2, 0.6 * n_lengths + 0.8), max(2.4, 0.3 * n_depths + 1.3)
    columns = min(len(labels), max(1, int(WIDEST // width)))
    rows = -(-len(labels) // columns)
    size = (columns * width + 1, rows * height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(labels) :]:
        axes.remove()
    images = [
        _heat_map(axes, [example[label] for example in of_task], label)
        for axes, label in zip(grid.flat, labels, strict=False)
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


def _heat_map(axes: Axes, records: Sequence[Record], label: str) -> AxesImage:
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
    axes.set_title(_wrapped(label), fontsize=9)
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


def _accuracy(answers: Answers, labels: Sequence[str]) -> Figure:
    """Mean score, with its confidence interval, against the share of KV kept and against both speeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("KV entries kept, %", "time to first token, s (median)", "decoding, tokens/s (median)")
    for index, label in enumerate(labels):
        records = [example[label] for example in answers.values()]
        score = mean_estimate([record.score for record in records])
        bars = [[100 * (score.mean - score.low)], [100 * (score.high - score.mean)]]
        speeds = [record.decode_tokens_per_s for record in records if record.decode_tokens_per_s is not None]
        places = (
            100 * kept_share(records),
            median(record.ttft_s for record in records),
            median(speeds) if speeds else float("nan"),
        )
        for axes, place in zip(panels, places, strict=True):
            axes.errorbar(
                [place],
                [100 * score.mean],
                yerr=bars,
                fmt=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                capsize=3,
                label=label,
            )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xlabel(title)
        axes.set_xlim(left=0)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.05)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean score, %, with 95 % interval")
    panels[0].set_ylim(-3, 103)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(labels), 2), fontsize=9, frameon=False)
    tasks = sorted({example[labels[0]].task for example in answers.values()})
    figure.suptitle(f"{', '.join(tasks)}: {len(answers)} examples for each policy", fontsize=11)
    return figure


def _wrapped(label: str) -> str:
    """A label over several lines: a setting each."""
    return label.replace(":", ":\n", 1).replace(",", ",\n")
