"""Markdown: a table, and the part of a page that a command writes between two marks, and nothing else of the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastkv.console.files import check_replaceable, read_text, write_whole
from fastkv.errors import FastKVError

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what would end a cell is replaced."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |\n" for line in lines)


def check_page(path: Path, setting: str) -> None:
    """FastKVError unless a part can go there: into a new file, or between the marks of one that has them."""
    check_replaceable(path, setting)
    if os.path.exists(path):
        _around(path, setting)


def write_page(path: Path, title: str, part: str, setting: str) -> None:
    """Put `part` between the marks of the page, or into a page of that title where there is none."""
    before, after = _around(path, setting) if os.path.exists(path) else (f"# {title}\n\n", "\n")
    write_whole(path, f"{before}{BEGIN}\n\n{part.strip()}\n\n{END}{after}", setting)


def _around(path: Path, setting: str) -> tuple[str, str]:
    """The page's text in front of the marks, and after them."""
    text = read_text(path, setting)[0].decode()  # with a byte-order mark, where it has one
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise FastKVError(
            f"{path}: is there already, without one {BEGIN} and one {END} after it to write between; "
            "put them in, or name a new file",
            setting=setting,
        )
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
