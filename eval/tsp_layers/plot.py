"""How importance settles with depth, as a picture: overlap, coverage and attained share of each layer's choice.

Needs matplotlib, the extra `eval`. Drawn without a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastkv.console.picture import legend_below, save_picture
from fastkv.eval.tsp_layers.advice import Setting
from fastkv.eval.tsp_layers.importance import Importance
from fastkv.eval.tsp_layers.report import later

PANELS = {
    "overlap": "shared with later layers' choices, %",
    "coverage": "later layers' scores covered, %",
    "attained": "of what could be covered, %",
}


def draw(importance: Importance, default: Setting, advice: Setting, title: str, path: Path) -> None:
    """Write the PNG; FastKVError where it cannot be written."""
    save_picture(figure_of(importance, default, advice, title), path, "plot")


def figure_of(importance: Importance, default: Setting, advice: Setting, title: str) -> Figure:
    """A panel for each quantity, a line for each rate; the lowest of the later layers is dotted."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels: dict[str, Axes] = dict(zip(PANELS, figure.subplots(1, 3), strict=True))
    layers = range(importance.attained.shape[1])
    shades = colormaps["viridis"].resampled(len(importance.rates) + 1)
    for index, rate in enumerate(importance.rates):
        shade = shades(index)
        for what in ("overlap", "coverage"):
            parts = [later(importance, index, layer, what) for layer in layers]
            means, lowest = [100 * sum(part) / len(part) for part in parts], [100 * min(part) for part in parts]
            panels[what].plot(layers, means, color=shade, marker="o", markersize=4, label=f"rate {rate:g}")
            panels[what].plot(layers, lowest, color=shade, linestyle=":", linewidth=1)
        shares = [100 * share for share in importance.attained[index].tolist()]
        panels["attained"].plot(layers, shares, color=shade, marker="o", markersize=4)
    for what, axes in panels.items():
        _finish(axes, PANELS[what], default, advice)
    legend_below(figure, panels["overlap"])
    figure.suptitle(f"{title}\nsolid: mean over the later layers; dotted: the lowest of them", fontsize=10)
    return figure


def _finish(axes: Axes, label: str, default: Setting, advice: Setting) -> None:
    if advice.layer == default.layer:
        _mark(axes, default.layer, "default and advice", "0.5", "center")
    else:  # the labels on the outer sides, for neighbours leave no room between them
        outer = ("right", "left") if default.layer < advice.layer else ("left", "right")
        _mark(axes, default.layer, "default", "0.5", outer[0])
        _mark(axes, advice.layer, "advice", "#d55e00", outer[1])
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _mark(axes: Axes, layer: int, label: str, colour: str, side: str) -> None:
    axes.axvline(layer, color=colour, linestyle="--", linewidth=1)
    align: Any = {"ha": side, "va": "bottom"}
    axes.annotate(label, (layer, 1.01), xycoords=("data", "axes fraction"), fontsize=8, color=colour, **align)
