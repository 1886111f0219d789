"""fastkv-eval head-scores: the table of retrieval-head scores that policy headkv reads.

It has the model copy answers out of generated texts, counts how often each head looks at the token that is being copied
(head_retrieval.py), prints the strongest heads (head_report.py) and writes the table as JSON. Heavy imports wait until
the flags are good.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.console.parser import DONE, Parser, add_machine_flags
from fastkv.errors import FastKVError, check_choice, check_integer, check_number
from fastkv.eval.cli_flags import DEFAULT_EXAMPLES, add_text_flags
from fastkv.eval.cli_tasks import load, plan_of
from fastkv.eval.tasks import NAMES, build_tasks
from fastkv.eval.tasks.longbench import is_longbench

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM
    from fastkv.eval.head_retrieval import Needle
    from fastkv.eval.runner import Plan

COPYING = ("niah_single", "niah_multikey", "archive")  # one answer, which always stands in the text word for word


def build_parser() -> Parser:
    parser = Parser(
        prog="fastkv-eval head-scores",
        description="Find the heads that copy from the prompt, and write their scores for policy headkv.",
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model folder, or hub id like org/name")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="write the scores there")
    parser.add_argument(
        "--task",
        nargs="+",
        default=["niah_single"],
        metavar="NAME",
        help=f"what is to be copied: {', '.join(COPYING)} (default niah_single)",
    )
    add_text_flags(parser)
    parser.add_argument(
        "--examples",
        type=int,
        default=DEFAULT_EXAMPLES,
        metavar="N",
        help=f"of each task, length and depth ({DEFAULT_EXAMPLES})",
    )
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    machine = parser.add_argument_group("machine")
    add_machine_flags(machine)
    machine.add_argument("--quiet", action="store_true", help="no progress line")
    parser.set_defaults(max_tokens=None, longbench_tokens=None)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; its exit status. Raises FastKVError, as eval/cli.py expects, for a user's mistake."""
    args = build_parser().parse_args(argv)
    _check(args)

    from fastkv.eval.head_report import content, left_out_line, table, write_scores
    from fastkv.eval.head_retrieval import head_scores, watch_copying
    from fastkv.eval.layer_progress import Progress

    llm, folder = load(args)
    plan = plan_of(args, build_tasks(args.task), llm.config.context_length)
    with Progress(None if args.quiet else sys.stderr) as progress:
        needles, left_out = _needles(llm, plan, args.chat, progress.show)
        parts = []
        for done, needle in enumerate(needles):
            progress.show("copying", done, len(needles))
            parts.append(watch_copying(llm, needle))
    scores = head_scores(parts, llm.config.n_kv_heads)
    if not scores.kv_heads.any():
        raise FastKVError(
            f"in {len(needles)} examples no head ever attended most to the token being copied, so there is nothing to "
            f"tell heads apart by, and {args.output} was not written; try shorter texts or another task"
        )
    counts = len(needles), left_out
    write_scores(args.output, content(llm, folder, _name(args.model), plan, args.chat, scores, *counts))
    print(table(scores), end="")
    if left_out:
        print(left_out_line(left_out, sum(counts)))
    return DONE


def _check(args: argparse.Namespace) -> None:
    for name in args.task:
        if name in (set(NAMES) - set(COPYING)) or is_longbench(name):
            raise FastKVError(
                f"{name} has no single answer that always stands in its text word for word, to be copied; "
                f"take {', '.join(COPYING)}",
                setting="task",
            )
        check_choice("task", name, COPYING)
    for length in args.length or []:
        check_integer("length", length, 1)
    for depth in args.depth:
        check_number("depth", depth, 0, 1)
    check_integer("examples", args.examples, 1)
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    _check_output(args.output)


def _check_output(path: Path) -> None:
    """Before hours of work: whether a file can be put there. What is there and is no file must not be replaced."""
    if not path.parent.is_dir():
        raise FastKVError(f"--output {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise FastKVError(f"--output {path}: is there already, and is no file; name another one")
    if path.exists() and not _may_be_replaced(path):
        raise FastKVError(f"--output {path}: is there already, and is none of this command's; name another one")
    if not os.access(path.parent, os.W_OK):
        raise FastKVError(f"--output {path}: the folder {path.parent} cannot be written to")


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is empty or of this command, whose files begin with their kind; another one may be dear."""
    from fastkv.eval.head_report import KIND

    try:
        with path.open("rb") as file:
            beginning = file.read(100)
    except OSError as error:
        raise FastKVError(f"--output {path}: cannot be read ({error.strerror})") from None
    return not beginning or KIND.encode() in beginning


def _needles(llm: LLM, plan: Plan, chat: bool, show: Callable[[str, int, int], None]) -> tuple[list[Needle], int]:
    """The examples of a plan, and how many of them had to be left out. All is checked before the model runs."""
    from fastkv.cache.policies import FullKV
    from fastkv.eval.head_retrieval import find_needle
    from fastkv.eval.policy_spec import PolicySpec
    from fastkv.eval.prompts import Prompts
    from fastkv.eval.runner import Runner

    prompts = Prompts(llm, chat)
    runner = Runner(llm, plan, [PolicySpec("full", FullKV())], prompts)
    slots = plan.slots()
    found = []
    for done, slot in enumerate(slots):
        show("writing", done, len(slots))
        example = runner.example(slot)
        continued = replace(example, lead=f"{example.lead} {example.answers[0]}")
        found.append(find_needle(prompts.ids(example), prompts.ids(continued)))
    needles = [needle for needle in found if needle is not None]
    if not needles:
        raise FastKVError(
            f"in none of the {len(slots)} examples do the answer's tokens stand in the prompt exactly once, so none "
            "can be copied: this model's tokenizer writes an answer otherwise behind the prompt than inside it; take "
            "another task" + (", or leave --chat out" if chat else "")
        )
    return needles, len(slots) - len(needles)


def _name(model: str) -> str:
    """A folder's name, or a hub id as it is."""
    folder = os.path.expanduser(model)
    return os.path.basename(os.path.abspath(folder)) if os.path.isdir(folder) else model
