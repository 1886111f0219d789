"""How every command reads its arguments, what it says on stderr, and how it ends."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastkv.console.progress import clear_line
from fastkv.console.ranks import begin_rank, check_alone, end_rank, last_words
from fastkv.console.warnings_told import warnings_told
from fastkv.errors import FastKVError, FaultError, brief, cut, one_line
from fastkv.kernels.out_of_memory import COMMAND, is_out_of_memory, told
from fastkv.kernels.torchrun import world_size

_RESERVE = 4 << 20  # bytes that are kept for telling that there are no more

DONE, FAULT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
_LONGEST_NAME = 4096  # of a file, on any system of today
_LONGEST_LINE = 10_000  # characters of whatever is said
_LONGEST = 300  # characters of a complaint about the command line, which quotes what it did not understand


class Parser(argparse.ArgumentParser):
    """Knows flags by their whole names only, and raises its complaints as FastKVError, without the usage text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise FastKVError(cut(message, _LONGEST))

    def _print_message(self, message: str, file: Any = None) -> None:
        """Of --help and --version; argparse's own says nothing of a disk that is full."""
        stream = file or sys.stderr
        if stream is not None:
            stream.write(message)


def flag_of(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model folder, or hub id like org/name")


def add_machine_flags(group: argparse._ActionsContainer, quiet: str | None = None) -> None:
    """Where and how a model runs: the same for every command. quiet: the help of --quiet, where that is to be here."""
    group.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    group.add_argument("--weights", metavar="W", help="int8: matrices of 8-bit integers (default: as --dtype says)")
    group.add_argument("--kv-dtype", metavar="T", help="int8 or int4: entries of fewer bits (default: as --dtype says)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--revision", metavar="R", help="revision of a hub id")
    if quiet is not None:
        group.add_argument("--quiet", action="store_true", help=quiet)


def file_name(text: str) -> str:
    """The text of a flag as the name of a file; argparse's error for what no system takes as one."""
    if "\0" in text or len(text) > _LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"no file can be named {brief(text)}")
    return text


def file_path(text: str) -> Path:
    """The same, as a path."""
    return Path(file_name(text))


def guarded(
    name: str, work: Callable[[], int | None], settings: Collection[str] = (), takes_ranks: bool = False
) -> int:
    """Do the work of command `name`; its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted.

    settings: those that have a flag of this command, which a complaint about them begins with. takes_ranks: whether
    torchrun may start several processes of it, which are then ranks (console/ranks.py).
    """
    _occupy_closed_streams()
    begin_rank(name)
    status = _guarded(name, work if takes_ranks else partial(_alone, name, work), settings)
    if status == DONE:
        end_rank()
    return status


def _alone(name: str, work: Callable[[], int | None]) -> int | None:
    check_alone(name)
    return work()


def _guarded(name: str, work: Callable[[], int | None], settings: Collection[str]) -> int:
    write_utf8()  # typographic signs, whatever the locale says
    reserve: list[bytearray] = []
    try:
        reserve.append(bytearray(_RESERVE))  # never touched: it takes address space, and no memory
        with warnings_told(name, say):
            return _flushed(work) or DONE
    except FastKVError as error:
        return complain(name, error, settings)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        drop_stdout()  # the reader has gone: nothing is left to say
        return DONE
    except Exception as error:
        reserve.clear()
        if is_out_of_memory(error):
            line, status = told(error, COMMAND), USER_ERROR
        elif isinstance(error, OSError):
            line, status = str(error), FAULT
        else:
            raise
        drop_stdout()
        _say_last(f"{name}: error: {one_line(line, _LONGEST)}")
        return status


def complain(name: str, error: FastKVError, settings: Collection[str] = ()) -> int:
    """Say what is wrong, as `guarded` does; the exit status that it means."""
    flag = f"{flag_of(error.setting)}: " if error.setting is not None and error.setting in settings else ""
    _say_last(f"{name}: error: {flag}{error}")
    return FAULT if isinstance(error, FaultError) else USER_ERROR


def say(line: str) -> None:
    """One line on stderr, unless it is closed: then print would turn to stdout. Without a reader, nobody is told.

    A progress line makes way for it.
    """
    clear_line()
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(one_line(line, _LONGEST_LINE), file=sys.stderr)  # a file's name cannot move the cursor


def _say_last(line: str) -> None:
    """Why a command ends; of several ranks one says it."""
    if world_size() == 1:
        say(line)
    else:
        clear_line()
        last_words(one_line(line, _LONGEST_LINE))


def check_stdout() -> None:
    """OSError where standard output is closed: Python would print to nowhere, and say nothing."""
    if sys.stdout is None:
        raise OSError("standard output is closed")


def write_utf8(**settings: Any) -> None:
    """Text on stdout is UTF-8, whatever the locale says. settings: of TextIOWrapper.reconfigure, beyond that."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="backslashreplace", **settings)


def check_installed(flag: str, package: str, extra: str) -> None:
    """FastKVError unless `package`, which `flag` needs, can be found. Imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise FastKVError(f'{flag} needs {package}: pip install "fastkv[{extra}]"')


def _flushed(work: Callable[[], int | None]) -> int | None:
    """The work, and what it printed is written: Python itself would find out at exit, and say it in its own way."""
    try:
        return work()
    finally:  # --help ends with SystemExit
        if sys.stdout is not None:
            sys.stdout.flush()


def _occupy_closed_streams() -> None:
    """Let no file of ours become standard input, output or error, where a library's words would go into it."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that Python does not fail on it at exit."""
    if sys.stdout is None:
        return
    with suppress(OSError, ValueError):  # a program that calls the command may have put anything in its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
