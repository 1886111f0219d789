"""The flags of fastkv-run, and what they say of themselves. Runs nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastkv import __version__
from fastkv.cache.catalogue import POLICIES, SETTINGS, SharedSetting
from fastkv.console.parser import Parser, add_machine_flags, add_model_flag, file_name, flag_of


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
# What a complaint names the flag of.
NAMED_SETTINGS = {
    *SETTINGS,
    *SAMPLING_FLAGS,
    *("prompt", "chat", "chat_arg", "stop", "stop_token", "policy", "policy_file", "device", "dtype", "weights"),
    *("threads", "revision", "compile", "attention", "report"),
    *("prompts", "output", "batch_size", "kv_memory", "reuse_prefix", "decode_budget"),
    *("context", "cache", "save_cache"),
}


def build_parser() -> Parser:
    """Every flag of the command. Unset settings are None, so that the library's own defaults hold."""
    parser = Parser(
        prog="fastkv-run",
        description="Continue a long prompt with a Llama-family model, through FastKV (arXiv 2502.01068).",
    )
    add_model_flag(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        type=file_name,
        metavar="FILE",
        help="UTF-8 text file; - reads standard input (repeatable)",
    )
    parser.add_argument(
        "--prompts", type=file_name, metavar="FILE", help="JSONL of objects with prompt and, if wanted, id"
    )
    parser.add_argument(
        "--context",
        type=file_name,
        metavar="FILE",
        help="text that is read once, before each prompt; - reads standard input",
    )
    parser.add_argument(
        "--save-cache", type=file_name, metavar="FILE", help="write what was kept of --context, for --cache"
    )
    parser.add_argument(
        "--cache", type=file_name, metavar="FILE", help="what --save-cache wrote, in place of --context"
    )
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=", ".join(f"{name} (default)" if name == "fastkv" else name for name in POLICIES)
        + "; with it, what fastkv-eval tune remembered of this model is not used",
    )
    parser.add_argument(
        "--policy-file", type=file_name, metavar="FILE", help="policy and settings of a file by fastkv-eval tune"
    )
    policy = parser.add_argument_group("settings of the policies; one that a policy does not have is refused")
    _add_flags(policy, SETTINGS)
    sampling = parser.add_argument_group("generation")
    _add_flags(sampling, SAMPLING_FLAGS)
    sampling.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this (repeatable)")
    sampling.add_argument(
        "--stop-token", action="append", default=[], metavar="TOKEN", help="end before this token, or id (repeatable)"
    )
    sampling.add_argument(
        "--decode-budget",
        type=int,
        metavar="N",
        help="entries a KV head holds while the answer grows; what is dropped is forgotten (default: all are kept)",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="continue after an end-of-text token")
    sampling.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    sampling.add_argument("--system", metavar="TEXT", help="system message for --chat")
    sampling.add_argument(
        "--chat-arg", action="append", default=[], metavar="KEY=VALUE", help="variable of the template (repeatable)"
    )
    machine = parser.add_argument_group("machine and output")
    add_machine_flags(machine)
    machine.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, decode without captured graphs")
    machine.add_argument("--compile", action="store_true", help="compile the layers: a slow first run, then faster")
    machine.add_argument(
        "--attention", default="auto", metavar="B", help="auto (default), cudnn, flash, efficient, math"
    )
    machine.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    machine.add_argument(
        "--output",
        type=file_name,
        metavar="FILE",
        help="JSONL of the answers to several prompts; resumes where it stopped",
    )
    machine.add_argument("--batch-size", type=int, metavar="N", help="prompts at work at a time, with --output (8)")
    machine.add_argument("--kv-memory", type=int, metavar="MIB", help="for their KV caches (default: what there is)")
    machine.add_argument(
        "--reuse-prefix",
        action="store_true",
        default=None,
        help="several prompts that begin alike: compress that once, keep the rest whole (policy full shares it anyway)",
    )
    machine.add_argument(
        "--report", type=file_name, metavar="FILE", help="write a page that shows what was kept of the prompt (HTML)"
    )
    machine.add_argument("--verbose", action="store_true", help="tell which kernels were chosen, and how fast each was")
    machine.add_argument("--quiet", action="store_true", help="print no figures")
    machine.add_argument("--version", action="version", version=f"fastkv-run {__version__}")
    return parser


def _add_flags(group: argparse._ArgumentGroup, flags: Mapping[str, Flag | SharedSetting]) -> None:
    for name, flag in flags.items():
        group.add_argument(flag_of(name), type=flag.read, help=flag.help, metavar=flag.metavar)
