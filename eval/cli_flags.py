"""The flags of fastkv-eval's commands, what can be wrong with them before a model is there, and the texts of --help.

A flag that several commands have means the same in all of them, and is described once, in FLAGS.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from fastkv import __version__
from fastkv.cache.layer_map import KIND as MAP_KIND
from fastkv.console.files import check_folder, check_own_file, check_replaceable
from fastkv.console.jsonl import check_output
from fastkv.console.parser import (
    Parser,
    add_machine_flags,
    add_model_flag,
    check_installed,
    file_name,
    file_path,
    flag_of,
)
from fastkv.console.picture import check_picture
from fastkv.console.policy_file import KIND as POLICY_KIND
from fastkv.errors import FastKVError, check_choice, check_integer, check_number
from fastkv.eval.tasks import COPYING, GENERATED, NAMES, build_tasks
from fastkv.eval.turns.families import FAMILIES

_NUMBER, _NUMBERS = {"type": int, "metavar": "N"}, {"type": int, "nargs": "+", "metavar": "N"}
_FILE, _FOLDER = {"type": file_path, "metavar": "FILE"}, {"type": file_path, "metavar": "FOLDER"}
_WHERE = "where a single needle lies, 0 to 1 (0 0.25 0.5 0.75 1)"
_PAGE = "write the results there, between its two marks if it is a page"
FLAGS: dict[str, dict[str, Any]] = {
    "task": {"nargs": "+", "metavar": "NAME"},
    "policy": {"action": "append", "metavar": "P"},
    "length": {**_NUMBERS, "help": "prompts of N tokens (default 1024 2048 4096, as fits)"},
    "depth": {"type": float, "nargs": "+", "metavar": "D", "help": _WHERE},
    "seed": {"type": int, "metavar": "S", "help": "fixes every text (0)"},
    "examples": {**_NUMBER, "help": "of each task, length and depth (5)"},
    "max_tokens": {**_NUMBER, "help": "of an answer (default: the task's own)"},
    "qa_file": {**_FILE, "help": "questions of task qa"},
    "longbench": {**_FOLDER, "help": "your copy of LongBench"},
    "longbench_tokens": {**_NUMBER, "help": "cut its longer prompts to N tokens (what the model reads)"},
    "chat": {"action": "store_true", "help": "put prompts into the model's chat template"},
    "no_lead": {"action": "store_true", "help": "end prompts with the question, not with the beginning of its answer"},
    "question_after": {"action": "store_true", "help": "let the policy read the text alone: the question comes later"},
    "questions": {**_NUMBER, "help": "about each text, 1 to 20 (5)"},
    "mode": {"metavar": "M", "help": "turns: one conversation, the right answers in it (default); requests: see below"},
    "output": {**_FILE, "help": "keep every answer there, and continue from it"},
    "plots": {**_FOLDER, "help": "draw PNG pictures there (extra: eval)"},
    "plot": {"type": file_path, "metavar": "FILE.png", "help": "draw how importance settles (extra: eval)"},
    "json": {**_FILE, "help": "write every figure there"},
    "page": {"type": file_path, "metavar": "FILE.md", "help": _PAGE},
}
MODES, MOST_QUESTIONS = ("turns", "requests"), 20
TEXTS = ("length", "depth", "seed", "examples")  # which texts are drawn
# What a complaint names the flag of; the settings of policies are named in its message already.
SETTINGS = {
    *FLAGS,
    "model",
    "loss",
    "layers",
    "threshold",
    "text",
    "device",
    "dtype",
    "weights",
    "kv_dtype",
    "threads",
    "revision",
} - {"policy"}

SUMMARIES = {
    **{task.name: task.summary for task in GENERATED.values()},
    "qa": "questions over distractors, from --qa-file",
    "longbench": "every dataset of --longbench, or longbench:qasper … for one",
}
TASK_LIST = "".join(f"  {name:<17}{summary}\n" for name, summary in SUMMARIES.items())
CONTINUES = (
    "--output FILE.jsonl keeps every answer. The same command with the same file continues where it was stopped."
)
TASKS_EPILOG = f"""\
tasks:
{TASK_LIST}
  --qa-file FILE.jsonl holds one JSON object a line, such as
  {{"question": "Who …?", "answers": ["Ada Lovelace"], "context": "The passage that tells."}}
  --longbench FOLDER is your copy of LongBench: qasper.jsonl and others, there or in its data, dataset2prompt.json and
  dataset2maxlen.json, there or in its config. Nothing is downloaded.

policies:
  --policy full --policy fastkv:kv_retention=0.05,tsp_rate=1
  The first one is the baseline of the differences. Settings are those of fastkv-run, and so are their defaults; several
  values of one stand between slashes, as in fastkv:tsp_layer=2/4,tsp_rate=0.5/0.2. FastKV
  keeps 128 tokens at the least, so a short prompt keeps more than its 10 %: fastkv:min_tokens=8 makes 10 % mean 10 %.
  With kv_dtype=int8 or int4 among them, a policy's entries are stored so: full:kv_dtype=int8; with share_layers=FILE
  layers read others, as fastkv-eval share-layers found.

{CONTINUES}

another command: fastkv-eval tsp-layers --help
another command: fastkv-eval head-scores --help
another command: fastkv-eval share-layers --help
another command: fastkv-eval compare --help
another command: fastkv-eval tune --help
another command: fastkv-eval turns --help
"""
COMPARE_EPILOG = f"""\
policies:
  --policy fastkv --policy fastkv:tsp_layer=9/15/23,tsp_rate=0.5/0.2/0.1
  A name, or a name and settings of its own; several values of one setting stand between slashes. The full cache is
  always there, and the baseline of the differences. What makes the policies keep the same is set for all of them:
  kv_retention and min_tokens, and the decay of pyramidinfer, which has no budget; with --read-retention also what
  policies that keep all read in a step, what chooses it and layers that read everything included.

{CONTINUES}
"""
FAMILY_LIST = "".join(f"  {family.name:<17}{family.summary}\n" for family in FAMILIES.values())
TURNS_EPILOG = f"""\
tasks:
{FAMILY_LIST}
modes:
  turns     The questions follow on each other in one conversation. After each one the right answer is put there,
            whatever the model said.
  requests  Every question finds the text alone in the cache, as it was left there.
  Either way a text is read once, under the policy. Questions and right answers are kept whole.

{CONTINUES}
"""


def build_parser() -> Parser:
    """The parser of the command without a name, which runs tasks."""
    parser = _parser(
        "fastkv-eval",
        "Ask a model questions about long texts, under several policies, and compare the answers.",
        TASKS_EPILOG,
    )
    _add(parser, "task", required=True, help="one or more of those below")
    parser.add_argument("--list", action="version", version=TASK_LIST, help="print the tasks and exit")
    _add(parser, "policy", help="repeatable (default: full, then fastkv)")
    _add(parser, *TEXTS[:-1])
    _add(parser, "examples", help="of each task, length and depth (5); of a LongBench dataset the first N (all)")
    _add(parser, "max_tokens", "qa_file", "longbench", "longbench_tokens")
    chat = "put prompts into the model's chat template, but for LongBench's few-shot and code datasets"
    _add(parser, "chat", help=chat)
    _add(parser, "no_lead", "question_after", "output", "plots")
    add_machine_flags(parser.add_argument_group("machine"), quiet="nothing but the tables")
    parser.add_argument("--version", action="version", version=f"fastkv-eval {__version__}")
    return parser


def _tsp_layers() -> Parser:
    parser = _parser("fastkv-eval tsp-layers", "Advise a TSP layer and rate for a model, and check it by running it.")
    what = parser.add_argument_group("prompts: one of these two")
    what.add_argument(
        "--prompt", action="append", type=file_name, metavar="FILE", help="a text of your own (repeatable)"
    )
    _add(what, "task", help="generated questions, by the tasks of fastkv-eval")
    _add(parser.add_argument_group("generated questions"), *TEXTS, "qa_file")
    _add(parser, "policy", action="store", default="fastkv", help="fastkv:setting=value,… (default fastkv)")
    rates = [0.05, 0.1, 0.2, 0.3, 0.5]
    parser.add_argument(
        "--tsp-rate", type=float, nargs="+", default=rates, metavar="R", help="rates (0.05 0.1 0.2 0.3 0.5)"
    )
    _add(parser, "max_tokens", help="of an answer (the task's own); compared of a --prompt (32)")
    _add(parser, "chat", "plot", "json")
    add_machine_flags(parser.add_argument_group("machine"), quiet="no progress line")
    return parser


def _head_scores() -> Parser:
    parser = _parser(
        "fastkv-eval head-scores", "Find the heads that copy from the prompt, and write their scores for policy headkv."
    )
    parser.add_argument("--output", type=file_path, required=True, metavar="FILE.json", help="write the scores there")
    copied = f"what is to be copied: {', '.join(COPYING)} (default niah_single)"
    _add(parser, "task", default=["niah_single"], help=copied)
    _add(parser, *TEXTS, "chat")
    add_machine_flags(parser.add_argument_group("machine"), quiet="no progress line")
    return parser


def _share_layers() -> Parser:
    parser = _parser(
        "fastkv-eval share-layers",
        "Find layers that can read an earlier layer's K and V in place of their own (KVSharer, arXiv 2410.18517), and "
        "write the map for --share-layers.",
    )
    parser.add_argument("--layers", type=int, required=True, metavar="C", help="layers that are to read others")
    parser.add_argument("--output", type=file_path, required=True, metavar="FILE.json", help="write the map there")
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="cosine of the final hidden states that must be exceeded (0.5)"
    )
    parser.add_argument(
        "--text", type=file_name, metavar="FILE", help="a text of your own to compare layers on (small talk)"
    )
    _add(parser, "length", nargs=None, help="texts of N tokens (64)")
    _add(parser, "examples", help="texts at most (30)")
    _add(parser, "seed")
    add_machine_flags(parser.add_argument_group("machine"), quiet="no progress line")
    return parser


def _compare() -> Parser:
    parser = _parser(
        "fastkv-eval compare",
        "Compare all policies at equal kept bytes, or at equal bytes read in a step: accuracy, time to first token, "
        "tokens/s, bytes.",
        COMPARE_EPILOG,
    )
    equal = parser.add_mutually_exclusive_group()
    equal.add_argument("--kv-retention", type=float, nargs="+", metavar="R", help="share of the KV that all keep (0.1)")
    equal.add_argument(
        "--read-retention", type=float, nargs="+", metavar="R", help="share of the KV that a step of all reads, instead"
    )
    _add(parser, "policy", help="repeatable (default: all there are)")
    parser.add_argument("--head-scores", type=file_path, metavar="FILE", help="of headkv, by fastkv-eval head-scores")
    tasks = parser.add_argument_group("questions")
    _add(tasks, "task", default=["niah_single"], help="of fastkv-eval --list (niah_single)")
    _add(tasks, *TEXTS, "max_tokens", "qa_file", "chat", "no_lead", "question_after")
    _add(parser.add_argument_group("files"), "output", "plots", "page")
    add_machine_flags(parser.add_argument_group("machine"), quiet="nothing but the tables")
    return parser


def _tune() -> Parser:
    parser = _parser(
        "fastkv-eval tune",
        "Find FastKV's settings for a model: TSP layer and rate, reach, and the smallest KV retention. fastkv-run then "
        "takes them for this model by itself.",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=file_name,
        metavar="FILE",
        help="a text of your own to hide needles in, repeatable (small talk)",
    )
    parser.add_argument(
        "--loss", type=float, metavar="POINTS", help="of 100 needles that the full cache finds, lost at most (5)"
    )
    _add(parser, "length", nargs=None, help="prompts of N tokens at most (1024)")
    _add(parser, "examples", help="needles, of which half choose (40)")
    _add(parser, "seed", help="fixes every needle (0)")
    parser.add_argument(
        "--output", type=file_path, metavar="FILE.json", help="write the policy there, too, for --policy-file"
    )
    add_machine_flags(parser.add_argument_group("machine"), quiet="no progress line")
    return parser


def _turns() -> Parser:
    parser = _parser(
        "fastkv-eval turns",
        "Ask a model several questions about a text that it has read once, under several policies.",
        TURNS_EPILOG,
    )
    _add(parser, "task", default=["kv"], help="one or more of those below (kv)")
    _add(parser, "mode", "questions")
    _add(parser, "policy", help="repeatable (default: full, then fastkv)")
    _add(parser, "length", help="texts of N tokens, questions not counted (default 1024 2048 4096, as fits)")
    _add(parser, "examples", help="texts of each task and length (5)")
    _add(parser, "seed", "max_tokens", "output")
    add_machine_flags(parser.add_argument_group("machine"), quiet="nothing but the tables")
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "tasks": build_parser,
    "tsp-layers": _tsp_layers,
    "head-scores": _head_scores,
    "share-layers": _share_layers,
    "compare": _compare,
    "tune": _tune,
    "turns": _turns,
}


def _parser(prog: str, description: str, epilog: str | None = None) -> Parser:
    """A parser with --model; a flag that the command lacks reads as one that was not given."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=description, epilog=epilog, formatter_class=formatter)
    unset = {name for name, flag in FLAGS.items() if "action" not in flag} | {
        "kv_retention",
        "read_retention",
        "tsp_rate",
    }
    parser.set_defaults(command=prog.removeprefix("fastkv-eval").strip() or "tasks", **dict.fromkeys(unset))
    add_model_flag(parser)
    return parser


def _add(group: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Flags of FLAGS, with what this command has otherwise."""
    for name in names:
        group.add_argument(flag_of(name), **{**FLAGS[name], **changes})


def check(args: argparse.Namespace) -> None:
    """FastKVError for flags out of range or at odds with each other, and for what could not be written at the end.

    Adds `args.tasks`, which --task names.
    """
    if args.command == "tune":
        _check_tune(args)
        return
    if args.command == "turns":
        _check_turns(args)
        return
    if args.command == "share-layers":
        _check_share_layers(args)
        return
    if args.command == "tsp-layers":
        _check_prompts(args)
    for name in [] if args.command == "tasks" else args.task or []:
        check_choice("task", name, COPYING if args.command == "head-scores" else NAMES)
    args.tasks = build_tasks(args.task or [], args.qa_file, args.longbench)
    _check_numbers(args)
    if args.output is not None and args.command != "head-scores":
        check_output(args.output)
    if args.plots is not None:
        check_installed("--plots", "matplotlib", "eval")
        check_folder(args.plots, "plots")
    if args.json is not None:
        check_replaceable(args.json, "json")
    if args.plot is not None:
        check_picture(args.plot, "plot", "eval")
    if (
        args.page is not None
        and args.output is not None
        and os.path.realpath(args.page) == os.path.realpath(args.output)
    ):
        raise FastKVError(f"{args.page}: is the file of --output; name another one", setting="page")


def _check_tune(args: argparse.Namespace) -> None:
    if args.length is not None:
        check_integer("length", args.length, 1)
    if args.examples is not None:
        check_integer("examples", args.examples, 16)
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    if args.loss is not None:
        check_number("loss", args.loss, 0, 100)
    if args.output is not None:
        check_own_file(args.output, POLICY_KIND)


def _check_share_layers(args: argparse.Namespace) -> None:
    check_integer("layers", args.layers, 1)
    for name in ("length", "examples"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1)
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    if args.threshold is not None:
        check_number("threshold", args.threshold, -1, 1)
    if args.kv_dtype is not None:
        raise FastKVError("layers are compared by their K and V as they are: leave it out", setting="kv_dtype")
    check_own_file(args.output, MAP_KIND)


def _check_turns(args: argparse.Namespace) -> None:
    for name in args.task:
        check_choice("task", name, tuple(FAMILIES))
    if args.mode is not None:
        check_choice("mode", args.mode, MODES)
    if args.questions is not None:
        check_integer("questions", args.questions, 1, MOST_QUESTIONS)
    _check_integers(args)
    if args.output is not None:
        check_output(args.output)


def _check_prompts(args: argparse.Namespace) -> None:
    if (args.prompt is None) == (args.task is None):
        raise FastKVError("give either --prompt FILE or --task NAME: what to measure on")
    given = [flag_of(name) for name in (*TEXTS, "qa_file") if getattr(args, name) is not None]
    if args.prompt and given:
        raise FastKVError(f"{given[0]} is for --task: leave it out with --prompt")


def _check_integers(args: argparse.Namespace) -> None:
    for length in args.length or []:
        check_integer("length", length, 1)
    for name in ("examples", "max_tokens", "longbench_tokens", "threads"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1, 4096 if name == "threads" else None)


def _check_numbers(args: argparse.Namespace) -> None:
    _check_integers(args)
    for depth in args.depth or []:
        check_number("depth", depth, 0, 1)
    for name in ("kv_retention", "read_retention", "tsp_rate"):
        for share in getattr(args, name) or []:
            if not 0 < share < 1:
                raise FastKVError(f"{flag_of(name)} {share:g}: must be above 0 and below 1")
    if args.length and not any(task.has_length for task in args.tasks):
        message = "LongBench's prompts have lengths of their own; --longbench-tokens cuts them"
        raise FastKVError(message, setting="length")
    if args.longbench_tokens is not None and all(task.has_length for task in args.tasks):
        raise FastKVError("is for --task longbench: add it, or leave it out", setting="longbench_tokens")
