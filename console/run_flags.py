"""The flags of the commands that generate text from a person's prompt: fastkv-run and fastkv-chat."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastkv.cache.catalogue import SETTINGS, SharedSetting
from fastkv.console.parser import flag_of


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


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of the policies."""
    group = parser.add_argument_group("settings of the policies; one that a policy does not have is refused")
    _add_flags(group, SETTINGS)


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """How tokens are chosen, and what ends a text."""
    _add_flags(group, SAMPLING_FLAGS)
    group.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this (repeatable)")
    group.add_argument(
        "--stop-token", action="append", default=[], metavar="TOKEN", help="end before this token, or id (repeatable)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="continue after an end-of-text token")


def add_chat_flags(group: argparse._ArgumentGroup, system: str) -> None:
    """What a chat template is given besides the messages. system: the help of --system."""
    group.add_argument("--system", metavar="TEXT", help=system)
    group.add_argument(
        "--chat-arg", action="append", default=[], metavar="KEY=VALUE", help="variable of the template (repeatable)"
    )


def add_engine_flags(group: argparse._ArgumentGroup) -> None:
    """How the engine computes, beyond `add_machine_flags`."""
    group.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, decode without captured graphs")
    group.add_argument("--compile", action="store_true", help="compile the layers: a slow first run, then faster")
    group.add_argument(
        "--offload", action="store_true", help="a prompt that does not fit on the device: by host memory"
    )
    group.add_argument("--attention", default="auto", metavar="B", help="auto (default), cudnn, flash, efficient, math")


def given_flags(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names whose flags were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _add_flags(group: argparse._ArgumentGroup, flags: Mapping[str, Flag | SharedSetting]) -> None:
    for name, flag in flags.items():
        group.add_argument(flag_of(name), type=flag.read, help=flag.help, metavar=flag.metavar)
