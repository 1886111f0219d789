"""fastkv-eval: long-context tasks, any model, policies side by side.

`fastkv-eval --model … --task …` runs tasks; a first argument without a dash names another command of COMMANDS. Tables
go to stdout, progress and complaints to stderr. Exit status as fastkv-run: 0, 1 a fault, 2 a mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from fastkv.cli_flags import DONE, FAULT, INTERRUPTED, USER_ERROR
from fastkv.errors import FastKVError


class Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        say(f"fastkv-eval: error: {FastKVError(message)}")
        sys.exit(USER_ERROR)


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
    arguments = sys.argv[1:] if argv is None else argv
    # The tables have typographic signs, whatever the locale says.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="replace")
    try:
        return _dispatch(arguments)
    except FastKVError as error:
        say(f"fastkv-eval: error: {_flag(error)}{error}")
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone
        return DONE
    except OSError as error:
        say(f"fastkv-eval: error: {error}")
        return FAULT


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        return COMMANDS["tasks"](arguments)
    if arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise FastKVError(f"no command {arguments[0]!r}; there are {known}, and flags alone mean tasks")
    return COMMANDS[arguments[0]](arguments[1:])


def _flag(error: FastKVError) -> str:
    """The flag of the setting at fault; those of policies are named in the message already."""
    flags = ("model", "task", "length", "depth", "examples", "seed", "max_tokens", "qa_file", "chat")
    longbench = ("longbench", "longbench_tokens")
    machine = ("device", "dtype", "threads", "revision")
    return f"--{error.setting.replace('_', '-')}: " if error.setting in (*flags, *longbench, *machine) else ""


def say(line: str) -> None:
    """One line on stderr, unless it is closed."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)
