"""PNG pictures that commands draw: whether that can be done, and how they are written. Needs matplotlib to draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.console.files import check_writable, unwritable
from fastkv.console.parser import check_installed, flag_of
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def check_picture(path: Path, setting: str, extra: str) -> None:
    """FastKVError unless `path` is named as a picture, can be written, and there is something to draw it with."""
    if path.suffix.lower() != ".png":
        raise FastKVError(f"{path}: the plot is a PNG; let its name end in .png", setting=setting)
    check_installed(flag_of(setting), "matplotlib", extra)
    check_writable(path, setting)


def save_picture(figure: Figure, path: Path, setting: str) -> None:
    """Write the PNG; FastKVError, naming the setting, where that cannot be done."""
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise unwritable(path, error, setting) from None
