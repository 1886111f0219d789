"""fastkv-eval compare: every policy there is, at equal kept bytes, on the same questions.

Each policy gets the settings under which it keeps as many entries as the others (settings.py). What comes out is a row
for each policy (table.py), pictures (plots.py) and the results part of a page (page.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastkv.eval.compare.page import check_page, page_part, write_page
from fastkv.eval.compare.settings import Terms, check_names, equal_policies
from fastkv.eval.compare.table import render
from fastkv.eval.run import ask, conclude, load, plan_of, tell


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status. Raises FastKVError for a user's mistake."""
    check_names(args.policy, args.head_scores)
    if args.page is not None:
        check_page(args.page)
    llm, folder = load(args)
    plan = plan_of(args, llm.config.context_length)
    terms = Terms(llm.config.n_layers, llm.config.n_kv_heads, plan.lengths, args.head_scores)
    specs, left_out = equal_policies(args.policy, sorted(set(args.kv_retention)), terms)
    results, missing = ask(args, llm, folder, plan, specs, left_out)
    entry_bytes = 2 * llm.config.head_dim * llm.dtype.itemsize
    tables = render(results.records, specs, entry_bytes, left_out)
    status = conclude(args, tables, missing)
    pictures: list[Path] = []
    if args.plots is not None:
        from fastkv.eval.compare.plots import draw

        pictures = draw(results.records, specs, entry_bytes, args.plots)
    if args.page is not None and not missing:  # a page tells of whole runs alone
        write_page(args.page, page_part(results.header, args.words, tables, pictures, args.page))
    written = [*pictures, *([args.page] if args.page is not None and not missing else [])]
    tell(args, *(f"wrote {path}" for path in written))
    return status
