"""The flags of fastkv-run, what they say of themselves, and how a mistake in them is told. Runs nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fastkv import __version__
from fastkv.cache.catalogue import POLICIES, SETTINGS, SharedSetting
from fastkv.errors import FastKVError

DONE, FAULT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Flag:
    """How the text of a flag is read (raises ValueError), and what --help says of it."""

    read: Callable[[str], Any]
    metavar: str
    help: str


SAMPLING_FLAGS = {
    "max_tokens": Flag(int, "N", "tokens to generate at most (default 256, or what the context leaves)"),
    "temperature": Flag(float, "T", "0 is greedy (default), and then the next three and --seed decide nothing"),
    "top_k": Flag(int, "K", "sample from the K most probable tokens (default 0: all)"),
    "top_p": Flag(float, "P", "sample from the fewest tokens that together reach P (default 1: all)"),
    "min_p": Flag(float, "P", "drop tokens below P times the most probable one (default 0: none)"),
    "repetition_penalty": Flag(float, "X", "above 1, tokens seen before are less likely (default 1)"),
    "seed": Flag(int, "S", "the same seed gives the same text"),
}
_OTHER_SETTINGS = (
    *("prompt", "chat", "stop", "policy", "device", "dtype"),
    *("threads", "revision", "compile", "attention", "report"),
    *("prompts", "output", "batch_size", "kv_memory"),
)


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        complain(str(FastKVError(message)))  # one line, whatever the arguments hold
        sys.exit(USER_ERROR)


def flag_of(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def add_machine_flags(group: argparse._ArgumentGroup) -> None:
    """Where and how a model runs: the same for every command."""
    group.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--revision", metavar="R", help="revision of a hub id")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the command. Unset settings are None, so that the library's own defaults hold."""
    parser = _Parser(
        prog="fastkv-run",
        description="Continue a long prompt with a Llama-family model, through FastKV (arXiv 2502.01068).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model folder, or hub id like org/name")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="FILE",
        help="UTF-8 text file; - reads standard input (repeatable)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSONL of objects with prompt and, if wanted, id")
    parser.add_argument(
        "--policy",
        default="fastkv",
        metavar="NAME",
        help=", ".join(f"{name} (default)" if name == "fastkv" else name for name in POLICIES),
    )
    policy = parser.add_argument_group("settings of the policies; one that a policy does not have is refused")
    _add_flags(policy, SETTINGS)
    sampling = parser.add_argument_group("generation")
    _add_flags(sampling, SAMPLING_FLAGS)
    sampling.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", help="continue after an end-of-text token")
    sampling.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    sampling.add_argument("--system", metavar="TEXT", help="system message for --chat")
    machine = parser.add_argument_group("machine and output")
    add_machine_flags(machine)
    machine.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, decode without captured graphs")
    machine.add_argument("--compile", action="store_true", help="torch.compile: a slow start, then a little faster")
    machine.add_argument(
        "--attention", default="auto", metavar="B", help="auto (default), cudnn, flash, efficient, math"
    )
    machine.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    machine.add_argument(
        "--output", metavar="FILE", help="JSONL of the answers to several prompts; resumes where it stopped"
    )
    machine.add_argument("--batch-size", type=int, metavar="N", help="prompts at work at a time, with --output (8)")
    machine.add_argument("--kv-memory", type=int, metavar="MIB", help="for their KV caches (default: what there is)")
    machine.add_argument("--report", metavar="FILE", help="write a page that shows what was kept of the prompt (HTML)")
    machine.add_argument("--quiet", action="store_true", help="print no figures")
    machine.add_argument("--version", action="version", version=f"fastkv-run {__version__}")
    return parser


def _add_flags(group: argparse._ArgumentGroup, flags: Mapping[str, Flag | SharedSetting]) -> None:
    for name, flag in flags.items():
        group.add_argument(flag_of(name), type=flag.read, help=flag.help, metavar=flag.metavar)


def complain(message: str, setting: str | None = None) -> None:
    """One line on stderr, naming the flag of the setting at fault."""
    flags = {*SETTINGS, *SAMPLING_FLAGS, *_OTHER_SETTINGS}
    prefix = f"{flag_of(setting)}: " if setting in flags and setting is not None else ""
    say(f"fastkv-run: error: {prefix}{message}")


def say(line: str) -> None:
    if sys.stderr is not None:  # closed: print would turn to stdout
        print(line, file=sys.stderr)
