"""fastkv-eval: long-context tasks, any model, policies compared with each other.

`fastkv-eval --model … --task …` runs tasks; a first argument without a dash names another command of COMMANDS. Tables
go to stdout, progress and complaints to stderr. Exit status as fastkv-run: 0, 1 a fault, 2 a mistake, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib import import_module

from fastkv.console.parser import check_stdout, guarded
from fastkv.errors import FastKVError, brief
from fastkv.eval.cli_flags import PARSERS, SETTINGS, check

# Where the work of each command is, as `run(args)`. Imported when it is called: a mistake in flags is told at once.
COMMANDS = {
    "tasks": "fastkv.eval.run",
    "tsp-layers": "fastkv.eval.tsp_layers.command",
    "head-scores": "fastkv.eval.head_scores.command",
    "share-layers": "fastkv.eval.share_layers.command",
    "compare": "fastkv.eval.compare.command",
    "tune": "fastkv.eval.tune.command",
    "turns": "fastkv.eval.turns.command",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("fastkv-eval", lambda: _dispatch(sys.argv[1:] if argv is None else argv), SETTINGS)


def _dispatch(arguments: list[str]) -> int:
    name, words = "tasks", arguments
    if arguments and not arguments[0].startswith("-"):
        name, *words = arguments
    if name not in COMMANDS:
        raise FastKVError(f"no command {brief(name)}; there are {', '.join(COMMANDS)}, and flags alone mean tasks")
    args = PARSERS[name]().parse_args(words)
    args.words = words
    check_stdout()
    check(args)
    return int(import_module(COMMANDS[name]).run(args))
