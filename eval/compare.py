"""fastkv-eval compare: every policy there is, at equal kept bytes, on the same questions.

Each policy gets the settings under which it keeps as many entries as the others (compare_settings.py). What comes out
is a row for each policy (compare_table.py), pictures (compare_plots.py) and the results part of a page
(compare_page.py). Heavy imports wait until the flags are good.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastkv.console.parser import Parser, add_machine_flags
from fastkv.errors import FastKVError, check_choice
from fastkv.eval.cli_flags import DEFAULT_EXAMPLES, add_text_flags
from fastkv.eval.cli_tasks import ask, check, load, plan_of, say_missing, say_written
from fastkv.eval.tasks import NAMES, build_tasks

EPILOG = """\
policies:
  --policy fastkv --policy fastkv:tsp_layer=9/15/23,tsp_rate=0.5/0.2/0.1
  A name, or a name and settings of its own; several values of one setting stand between slashes. The full cache is
  always there, and the baseline of the differences. What makes the policies keep the same is set for all of them:
  kv_retention and min_tokens, and the decay of pyramidinfer, which has no budget.

--output FILE.jsonl keeps every answer. The same command with the same file goes on where it was stopped.
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="fastkv-eval compare",
        description="Compare all policies at equal kept bytes: accuracy, time to first token, tokens/s, bytes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model folder, or hub id like org/name")
    parser.add_argument(
        "--kv-retention", type=float, nargs="+", default=[0.1], metavar="R", help="share of the KV that all keep (0.1)"
    )
    parser.add_argument("--policy", action="append", metavar="P", help="repeatable (default: all there are)")
    parser.add_argument("--head-scores", type=Path, metavar="FILE", help="of headkv, by fastkv-eval head-scores")
    tasks = parser.add_argument_group("questions")
    tasks.add_argument(
        "--task", nargs="+", default=["niah_single"], metavar="NAME", help="of fastkv-eval --list (niah_single)"
    )
    add_text_flags(tasks)
    tasks.add_argument("--examples", type=int, metavar="N", help=f"of each task, length and depth ({DEFAULT_EXAMPLES})")
    tasks.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: the task's own)")
    tasks.add_argument("--qa-file", type=Path, metavar="FILE", help="questions of task qa")
    tasks.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, metavar="FILE", help="keep every answer there, and go on from it")
    files.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG pictures there (extra: eval)")
    files.add_argument(
        "--page", type=Path, metavar="FILE.md", help="write the results there, between its two marks if it is a page"
    )
    machine = parser.add_argument_group("machine")
    add_machine_flags(machine)
    machine.add_argument("--quiet", action="store_true", help="nothing but the tables")
    parser.set_defaults(longbench=None, longbench_tokens=None)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; its exit status. Raises FastKVError, as eval/cli.py expects, for a user's mistake."""
    args = build_parser().parse_args(argv)
    _check(args)
    tasks = build_tasks(args.task, args.qa_file)

    from fastkv.eval.compare_page import check_page, page_part, write_page
    from fastkv.eval.compare_settings import Terms, check_names, entrants
    from fastkv.eval.compare_table import render

    check_names(args.policy, args.head_scores)
    if args.page is not None:
        check_page(args.page)
    llm, folder = load(args)
    plan = plan_of(args, tasks, llm.config.context_length)
    terms = Terms(llm.config.n_layers, llm.config.n_kv_heads, plan.lengths, args.head_scores)
    rivals, left_out = entrants(args.policy, sorted(set(args.kv_retention)), terms)
    results, status = ask(args, llm, folder, plan, [rival.spec for rival in rivals], left_out)
    entry_bytes = 2 * llm.config.head_dim * llm.dtype.itemsize
    tables = render(results.records, rivals, entry_bytes, left_out)
    print(tables, end="", flush=True)
    missing = len(plan.slots()) * len(rivals) - len(results.records)
    say_missing(args, missing)
    pictures: list[Path] = []
    if args.plots is not None:
        from fastkv.eval.compare_plots import draw

        pictures = draw(results.records, rivals, entry_bytes, args.plots)
        say_written(args, pictures)
    if args.page is not None and not missing:  # a page tells of whole runs alone
        write_page(args.page, page_part(results.header, argv, tables, pictures, args.page))
        say_written(args, [args.page])
    return status


def _check(args: argparse.Namespace) -> None:
    for name in args.task:
        check_choice("task", name, NAMES)
    for retention in args.kv_retention:
        if not 0 < retention < 1:
            raise FastKVError(f"--kv-retention {retention:g}: must be above 0 and below 1")
    if args.page is not None and args.output is not None and args.page.resolve() == args.output.resolve():
        raise FastKVError(f"--page {args.page}: is the file of --output; name another one")
    check(args)
