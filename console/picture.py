"""PNG pictures that commands draw: whether that can be done, and how they are written. Needs matplotlib to draw."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.console.files import check_writable, write_whole
from fastkv.console.parser import check_installed, flag_of
from fastkv.errors import FastKVError
from fastkv.storage import unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# The first six are told apart by people with any colour vision; the markers tell lines apart without any.
COLOURS = (
    *("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"),
    *("#56b4e9", "#8c564b", "#7b3fbf", "#a3a500", "#8a8a8a", "#c2003f"),
)
MARKERS = "osD^vPX*<>hp"


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
    picture = BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    write_whole(path, picture.getvalue(), setting)


def save_pictures(figures: dict[str, Figure], folder: Path, setting: str) -> list[Path]:
    """Write the figures as PNG files of these names, into a folder that is made where there is none; their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, setting) from None
    for name, figure in figures.items():
        save_picture(figure, folder / name, setting)
    return [folder / name for name in figures]


def style(index: int) -> tuple[str, str]:
    """Colour and marker of a line by its place: the first twelve share neither, and no two share both for long."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
