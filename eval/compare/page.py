"""The part of a Markdown page that the comparison writes: what is between two markers, and nothing else of the page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastkv.console.files import check_replaceable, read_text, write_whole
from fastkv.errors import FastKVError

BEGIN, END = "<!-- results -->", "<!-- /results -->"
TITLE = "# Every policy at equal kept bytes"
_LINE = 110  # columns of the command before it is broken


def check_page(path: Path) -> None:
    """FastKVError unless the results can go there: into a new file, or between the markers of one that has them."""
    check_replaceable(path, "page")
    if path.exists():
        _around(path)


def write_page(path: Path, results: str) -> None:
    """Put `results` between the markers of the page, or into a page of its own where there is none."""
    before, after = _around(path) if path.exists() else (f"{TITLE}\n\n", "\n")
    write_whole(path, f"{before}{BEGIN}\n\n{results.strip()}\n\n{END}{after}", "page")


def page_part(header: dict[str, Any], argv: Sequence[str], tables: str, pictures: Sequence[Path], page: Path) -> str:
    """What was run, the pictures, the tables. header: the run's, as its file has it; pictures: links are relative."""
    where = f"{header['device']}, {header['dtype']}, {header['threads']} thread{'s' * (header['threads'] != 1)}"
    versions = f"fastkv {header['fastkv']}, torch {header['torch']}"
    about = f"Measured on {header['date']}: {header['model']} on {where}, {versions}."
    links = [f"![{picture.stem}]({_link(picture, page)})" for picture in pictures]
    return "\n\n".join([about, f"```\n{_command(argv)}\n```", *links, tables.strip()])


def _around(path: Path) -> tuple[str, str]:
    """The page's text in front of the markers, and after them."""
    text = read_text(path, "page")[0].decode()  # with a byte-order mark, where it has one
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise FastKVError(
            f"{path}: is there already, without one {BEGIN} and one {END} after it to write between; "
            "put them in, or name a new file",
            setting="page",
        )
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def _link(picture: Path, page: Path) -> str:
    return quote(Path(os.path.relpath(picture, page.parent)).as_posix())


def _command(argv: Sequence[str]) -> str:
    """The command line, broken in front of flags where it gets long."""
    flags: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(word)
    lines = ["fastkv-eval compare"]
    for flag in filter(None, map(shlex.join, flags)):
        if len(lines[-1]) + 1 + len(flag) > _LINE:
            lines.append(f"   {flag}")
        else:
            lines[-1] += f" {flag}"
    return " \\\n".join(lines)
