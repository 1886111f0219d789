"""fastkv-eval compare: every policy there is, at equal kept bytes or equal bytes read, on the same questions.

Each policy gets the settings under which it keeps as many entries as the others, or reads as much (settings.py). What
comes out is a row for each policy (table.py), pictures (plots.py) and the results part of a page.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastkv.console.markdown import check_page, write_page
from fastkv.errors import FastKVError
from fastkv.eval.compare.settings import Terms, check_names, equal_policies
from fastkv.eval.compare.table import render
from fastkv.eval.run import ask, conclude, load, plan_of, tell

TITLES = {"kept": "Every policy at equal kept bytes", "read": "Every policy at equal bytes read in a step"}
_LINE = 110  # columns of the command on the page before it is broken


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status. Raises FastKVError for a user's mistake."""
    check_names(args.policy, args.head_scores)
    if args.kv_dtype is not None and args.read_retention is not None:
        raise FastKVError("--read-retention compares entries in the model's dtype: leave --kv-dtype out")
    if args.page is not None:
        check_page(args.page, "page")
    llm, folder = load(args)
    plan = plan_of(args, llm.config.context_length)
    by, shares = ("kept", args.kv_retention or [0.1]) if args.read_retention is None else ("read", args.read_retention)
    sizes, entries = (llm.config.n_layers, llm.config.n_kv_heads), (llm.config.head_dim, llm.dtype)
    terms = Terms(*sizes, plan.lengths, args.head_scores, args.kv_dtype, by, *entries)
    if by == "read" and llm.config.sliding_window is not None:
        raise FastKVError(
            "--read-retention does not compare what layers with a sliding window read: take --kv-retention, or "
            "another model"
        )
    specs, left_out = equal_policies(args.policy, sorted(set(shares)), terms)
    results, missing = ask(args, llm, folder, plan, specs, left_out)
    entry_bytes = 2 * llm.config.head_dim * llm.dtype.itemsize
    tables = render(results.records, specs, entry_bytes, left_out, by)
    status = conclude(args, tables, missing)
    written: list[Path] = []
    if args.plots is not None:
        from fastkv.eval.compare.plots import draw

        written += draw(results.records, specs, entry_bytes, args.plots, by)
    if args.page is not None and not missing:  # a page tells of whole runs alone
        write_page(args.page, TITLES[by], page_part(results.header, args.words, tables, written, args.page), "page")
        written.append(args.page)
    tell(args, *(f"wrote {path}" for path in written))
    return status


def page_part(header: dict[str, Any], argv: Sequence[str], tables: str, pictures: Sequence[Path], page: Path) -> str:
    """What was run, the pictures, the tables. header: the run's, as its file has it; pictures: links are relative."""
    where = f"{header['device']}, {header['dtype']}, {header['threads']} thread{'s' * (header['threads'] != 1)}"
    versions = f"fastkv {header['fastkv']}, torch {header['torch']}"
    about = f"Measured on {header['date']}: {header['model']} on {where}, {versions}."
    places = [os.fsencode(Path(os.path.relpath(picture, page.parent)).as_posix()) for picture in pictures]
    links = [f"![{picture.stem}]({quote(place)})" for picture, place in zip(pictures, places, strict=True)]
    return "\n\n".join([about, f"```\n{_command(argv)}\n```", *links, tables.strip()])


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
