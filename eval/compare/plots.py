"""The comparison as pictures: a row for each policy, accuracy against bytes and speed, and the needle heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from fastkv.console.picture import COLOURS, legend_below, save_pictures
from fastkv.eval.compare.table import MIB, retentions_of
from fastkv.eval.plots import AGAINST, KEPT, accuracy, from_zero, heat_maps, needle_tasks
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate
from fastkv.eval.table import Answers, answered_by_all, grouped, median_speed, median_ttft, records_of, scores_of

PANELS = ("score, %, with 95 % interval", "time to first token, s", "decoding, tokens/s", "KV kept, MiB")
ROW, MARGIN, WIDTH = 0.34, 1.5, 12.0  # inches: of a policy, of what stands above and below, of the picture
SPREAD = 0.5  # of a row, taken by the marks of several retentions
FULL = COLOURS[0]


def draw(
    records: Sequence[Record], specs: Sequence[PolicySpec], entry_bytes: int, folder: Path, by: str = "kept"
) -> list[Path]:
    """Write the PNG files into `folder`; their paths.

    entry_bytes: of one token's K and V in a KV head. by: see Terms.
    """
    answers = answered_by_all(records, [spec.label for spec in specs])
    if not answers:
        return []
    retentions = retentions_of(specs)
    # At one retention the marks of all policies would stand on each other in the panel of what was kept.
    panels = [title for title in AGAINST if title != KEPT or len(retentions) > 1]
    series = {name: [spec.label for spec in specs if spec.title == name] for name in _names(specs)}
    figures: dict[str, Figure] = {}
    for task, of_task in sorted(grouped(answers, "task").items()):
        figures[f"comparison-{task}.png"] = rows(of_task, specs, entry_bytes, by)
        figures[f"accuracy-{task}.png"] = accuracy(of_task, dict(series), panels, crowded=True)
    for task in needle_tasks(answers):
        for retention in retentions:
            names = {spec.label: spec.title for spec in specs if spec.retention in (None, retention)}
            share = f"-{100 * retention:g}" if len(retentions) > 1 else ""
            figures[f"needle-{task}{share}.png"] = heat_maps(answers, names, task)
    return save_pictures(figures, folder, "plots")


def rows(answers: Answers, specs: Sequence[PolicySpec], entry_bytes: int, by: str = "kept") -> Figure:
    """A row for each policy, a panel for each of PANELS; a dashed line where the full cache stands."""
    names, retentions = _names(specs), retentions_of(specs)
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(names)))
    figure.set_layout_engine("constrained", wspace=0.06)
    panels = figure.subplots(1, len(PANELS), sharey=True, width_ratios=(1.6, 1, 1, 1))
    for spec in specs:
        colour, label, place = _look(spec, retentions, by)
        row = names.index(spec.title) + SPREAD * ((place + 0.5) / len(retentions) - 0.5)
        records, score = records_of(answers, spec.label), mean_estimate(scores_of(answers, spec.label))
        bars = [[100 * (score.mean - score.low)], [100 * (score.high - score.mean)]]
        look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "none", "label": label}
        panels[0].errorbar([100 * score.mean], [row], xerr=bars, capsize=2, elinewidth=1, **look)
        kept = fmean(record.kv_entries for record in records) * entry_bytes / MIB
        figures = (100 * score.mean, median_ttft(records), median_speed(records), kept)
        for axes, value in zip(panels[1:], figures[1:], strict=True):
            axes.plot([value], [row], **look)
        if spec.retention is None:
            for axes, value in zip(panels, figures, strict=True):
                axes.axvline(value, color=FULL, linestyle="--", linewidth=0.8, alpha=0.5)
    for axes, title in zip(panels, PANELS, strict=True):
        from_zero(axes, title, 5)
        axes.tick_params(left=axes is panels[0])
        axes.set_axisbelow(True)
    panels[0].set_xlim(-3, 103)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)  # the first policy on top
    legend_below(figure, panels[0])
    task = answers[0][specs[0].label].task
    figure.suptitle(f"{task}: {len(answers)} examples for each policy; times are medians", fontsize=11)
    return figure


def _look(spec: PolicySpec, retentions: Sequence[float], by: str) -> tuple[Any, str, float]:
    """Colour and label of a policy's mark, and its place among those of its row: one for each retention."""
    if spec.retention is None:
        return FULL, spec.title, (len(retentions) - 1) / 2
    place = retentions.index(spec.retention)
    shade = colormaps["viridis"]((place + 1) / (len(retentions) + 2))
    return shade, f"{100 * spec.retention:g} % {by}", place


def _names(specs: Sequence[PolicySpec]) -> list[str]:
    return list(dict.fromkeys(spec.title for spec in specs))
