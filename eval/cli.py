"""fastkv-eval: long-context tasks, any model, policies side by side.

`fastkv-eval --model … --task …` runs tasks; a first argument without a dash names another command of COMMANDS. Tables
go to stdout, progress and complaints to stderr. Exit status as fastkv-run: 0, 1 a fault, 2 a mistake, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastkv.console.parser import guarded, write_utf8
from fastkv.errors import FastKVError

# Settings that have a flag of the same name; those of policies are named in the message already.
SETTINGS = (
    *("model", "task", "length", "depth", "examples", "seed", "max_tokens", "qa_file", "chat"),
    *("longbench", "longbench_tokens", "device", "dtype", "threads", "revision"),
)


def _run_tasks(argv: list[str]) -> int:
    from fastkv.eval.cli_flags import build_parser
    from fastkv.eval.cli_tasks import run

    return run(build_parser().parse_args(argv))


def _tsp_layers(argv: list[str]) -> int:
    from fastkv.eval.tsp_layers import main

    return main(argv)


def _head_scores(argv: list[str]) -> int:
    from fastkv.eval.head_scores import main

    return main(argv)


def _compare(argv: list[str]) -> int:
    from fastkv.eval.compare import main

    return main(argv)


# Each takes the arguments behind its name and returns an exit status. Imported when called: --help answers at once.
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "tasks": _run_tasks,
    "tsp-layers": _tsp_layers,
    "head-scores": _head_scores,
    "compare": _compare,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    write_utf8()  # the tables have typographic signs, whatever the locale says
    return guarded("fastkv-eval", lambda: _dispatch(sys.argv[1:] if argv is None else argv), SETTINGS)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        return COMMANDS["tasks"](arguments)
    if arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise FastKVError(f"no command {arguments[0]!r}; there are {known}, and flags alone mean tasks")
    return COMMANDS[arguments[0]](arguments[1:])
