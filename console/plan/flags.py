"""The flags of fastkv-plan, and what they say of themselves. Runs nothing."""

from __future__ import annotations

import argparse
import re

from fastkv import __version__
from fastkv.cache.catalogue import POLICIES, SETTINGS
from fastkv.console.parser import Parser, file_name
from fastkv.console.run_flags import add_setting_flags
from fastkv.errors import brief

# What a complaint names the flag of; `prompt` is the length that --context says.
NAMED_SETTINGS = {
    *SETTINGS,
    *("context", "max_tokens", "batch", "gpus", "policy", "policy_file", "decode_budget", "dtype", "weights"),
    *("kv_dtype", "revision", "threads", "device", "memory", "bandwidth", "flops", "link", "link_latency"),
}
_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20}


def tokens(text: str) -> int:
    """131072, 128K or 1M: K is 1,024 tokens, and M 1,048,576."""
    found = re.fullmatch(r"([0-9]{1,12})([KM]?)", text.upper(), re.ASCII)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"takes a number of tokens such as 131072, 128K or 1M, not {brief(text)}")
    return int(found[1]) * _SUFFIXES[found[2]]


def build_parser() -> Parser:
    """Every flag of the command."""
    parser = Parser(
        prog="fastkv-plan",
        description="Memory, first token and decode speed of a request, worked out before there is a machine for it. "
        "No weights are loaded.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="a preset such as llama-3.1-70b, a folder with a config.json, or a hub id whose config.json is here",
    )
    parser.add_argument("--context", required=True, type=tokens, metavar="N", help="prompt tokens: 131072, 128K or 1M")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of the answer (256, or what is left)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts that decode together (1)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="tensor parallel over N GPUs (1)")
    parser.add_argument("--policy", metavar="NAME", help=", ".join(POLICIES) + " (default: fastkv)")
    parser.add_argument(
        "--policy-file", type=file_name, metavar="FILE", help="policy and settings of a file by fastkv-eval tune"
    )
    add_setting_flags(parser)
    request = parser.add_argument_group("request")
    request.add_argument("--decode-budget", type=int, metavar="N", help="entries a KV head holds while an answer grows")
    request.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    request.add_argument("--weights", metavar="W", help="int8: matrices of 8-bit integers (default: as --dtype says)")
    request.add_argument("--kv-dtype", metavar="T", help="int8 or int4: entries of fewer bits (default: as --dtype)")
    request.add_argument("--revision", metavar="R", help="revision of a hub id")
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default="h200", metavar="D", help="h200 (default); cpu or cuda: this machine")
    machine.add_argument("--measure", action="store_true", help="measure --device cpu or cuda now, for times")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    machine.add_argument("--memory", type=float, metavar="GIB", help="of each GPU, in place of what --device says")
    machine.add_argument("--bandwidth", type=float, metavar="GB/S", help="of its memory, the same")
    machine.add_argument("--flops", type=float, metavar="TFLOP/S", help="of a large product, the same")
    machine.add_argument("--link", type=float, metavar="GB/S", help="that each GPU sends to the others, the same")
    machine.add_argument("--link-latency", type=float, metavar="US", help="of an all-reduce (10, which is assumed)")
    machine.add_argument("--check", action="store_true", help="exit status 1 where it does not fit")
    machine.add_argument("--json", action="store_true", help="print one JSON object")
    machine.add_argument("--version", action="version", version=f"fastkv-plan {__version__}")
    return parser
