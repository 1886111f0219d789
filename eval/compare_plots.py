"""The comparison as pictures: a row for each policy, accuracy against bytes and speed, and the needle heat maps.

Needs matplotlib, the extra `eval`. Drawn without a display. Like the tables, the pictures count the examples that every
policy has answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from fastkv.eval.compare_settings import Entrant
from fastkv.eval.compare_table import MIB, at, retentions_of
from fastkv.eval.plots import AGAINST, accuracy, heat_maps, needle_tasks, save
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate
from fastkv.eval.table import Answers, answered_by_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = ("score, %, with 95 % interval", "time to first token, s", "decoding, tokens/s", "KV kept, MiB")
ROW, MARGIN, WIDTH = 0.34, 1.5, 12.0  # inches: of a policy, of what stands above and below, of the picture
SPREAD = 0.5  # of a row, taken by the marks of several retentions
FULL = "#1b1b1b"


def draw(records: Sequence[Record], entrants: Sequence[Entrant], entry_bytes: int, folder: Path) -> list[Path]:
    """Write the PNG files into `folder`; their paths. entry_bytes: of one token's K and V in a KV head."""
    answers = answered_by_all(records, [entrant.label for entrant in entrants])
    if not answers:
        return []
    full, retentions = entrants[0], retentions_of(entrants)
    figures: dict[str, Figure] = {}
    for task in sorted({example[full.label].task for example in answers.values()}):
        of_task = {id_: example for id_, example in answers.items() if example[full.label].task == task}
        figures[f"comparison-{task}.png"] = rows(of_task, entrants, entry_bytes)
        series: dict[str, Sequence[str]] = {
            name: [one.label for one in entrants if one.name == name] for name in _names(entrants)
        }
        # At one retention the marks of all policies would stand on each other in the panel of what was kept.
        panels = AGAINST if len(retentions) > 1 else AGAINST[1:]
        figures[f"accuracy-{task}.png"] = accuracy(of_task, series, panels, crowded=True)
    for task in needle_tasks(answers):
        for retention in retentions:
            names = {one.label: one.name for one in (full, *at(entrants, retention))}
            behind = f"-{100 * retention:g}" if len(retentions) > 1 else ""
            figures[f"needle-{task}{behind}.png"] = heat_maps(answers, names, task)
    return save(figures, folder)


def rows(answers: Answers, entrants: Sequence[Entrant], entry_bytes: int) -> Figure:
    """A row for each policy, a panel for each of PANELS; a dashed line where the full cache stands."""
    from matplotlib.figure import Figure

    names, n_retentions = _names(entrants), len(retentions_of(entrants))
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(names)))
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(PANELS), sharey=True, width_ratios=(1.6, 1, 1, 1))
    for entrant, (colour, label, place) in zip(entrants, _looks(entrants), strict=True):
        records = [example[entrant.label] for example in answers.values()]
        row = names.index(entrant.name) + SPREAD * ((place + 0.5) / n_retentions - 0.5)
        score = mean_estimate([record.score for record in records])
        bars = [[100 * (score.mean - score.low)], [100 * (score.high - score.mean)]]
        look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "none", "label": label}
        panels[0].errorbar([100 * score.mean], [row], xerr=bars, capsize=2, elinewidth=1, **look)
        figures = (100 * score.mean, *_figures(records, entry_bytes))
        for axes, value in zip(panels[1:], figures[1:], strict=True):
            axes.plot([value], [row], **look)
        if entrant.retention is None:
            for axes, value in zip(panels, figures, strict=True):
                axes.axvline(value, color=FULL, linestyle="--", linewidth=0.8, alpha=0.5)
    _finish(panels, names)
    handles, labels = panels[0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    first = next(iter(answers.values()))[entrants[0].label]
    figure.suptitle(f"{first.task}: {len(answers)} examples for each policy; times are medians", fontsize=11)
    return figure


def _looks(entrants: Sequence[Entrant]) -> list[tuple[Any, str, float]]:
    """Colour, label and place within its row of each mark: one for each retention."""
    from matplotlib import colormaps

    retentions = retentions_of(entrants)
    looks: list[tuple[Any, str, float]] = []
    for entrant in entrants:
        if entrant.retention is None:
            looks.append((FULL, entrant.name, (len(retentions) - 1) / 2))
        else:
            place = retentions.index(entrant.retention)
            shade = colormaps["viridis"]((place + 1) / (len(retentions) + 2))
            looks.append((shade, f"{100 * entrant.retention:g} % kept", place))
    return looks


def _finish(panels: Sequence[Axes], names: Sequence[str]) -> None:
    """Axes from zero, and the first policy on top."""
    for axes, title in zip(panels, PANELS, strict=True):
        axes.set_xlabel(title)
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(left=axes is panels[0])
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_xlim(-3, 103)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)


def _figures(records: Sequence[Record], entry_bytes: int) -> tuple[float, float, float]:
    """First token, decoding, and what the kept entries take: the panels behind the first one."""
    speeds = [record.decode_tokens_per_s for record in records if record.decode_tokens_per_s is not None]
    kept = fmean(record.kv_entries for record in records) * entry_bytes / MIB
    return median(record.ttft_s for record in records), median(speeds) if speeds else float("nan"), kept


def _names(entrants: Sequence[Entrant]) -> list[str]:
    return list(dict.fromkeys(entrant.name for entrant in entrants))
