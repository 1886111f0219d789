"""PNG pictures that commands draw: whether that can be done, and how they are written. Needs matplotlib to draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.console.files import check_writable, unwritable
from fastkv.console.parser import check_installed, flag_of
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def check_picture(path: Path, setting: str, extra: str) -> None:
    """FastKVError unless `path` is named as a picture, can be written, and there is something to draw it with."""
    if path.suffix.lower() != ".png":
        raise FastKVError(f"{path}: the plot is a PNG; let its name end in .png", setting=setting)
    check_installed(flag_of(setting), "matplotlib", extra)
    check_writable(path, setting)


def legend_below(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """The legend of all panels below them, from one of them; a label that comes up again stands there once."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    columns = columns or max(len(once), 1)
    figure.legend(once.values(), once, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def save_picture(figure: Figure, path: Path, setting: str) -> None:
    """Write the PNG; FastKVError, naming the setting, where that cannot be done."""
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise unwritable(path, error, setting) from None
