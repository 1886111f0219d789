"""The flags of fastkv-run, and what they say of themselves. Runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastkv import __version__
from fastkv.console.parser import Parser, add_machine_flags, add_model_flag, flag_of


def _one_or_more(kind: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """Reads `0.2` as a value and `0.5,0.2` as a tuple; argparse calls it by that name."""

    def read(text: str) -> Any:
        values = tuple(kind(part) for part in text.split(","))
        return values if len(values) > 1 else values[0]

    read.__name__ = name
    return read


# Settings of policies: each is a field of the policies that know it.
POLICY_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "tsp_layer": (
        _one_or_more(int, "int"),
        "layer behind whose attention tokens are dropped (default: half way up), or several: I,I,…; asl, structkv: the "
        "latest (default: last but one; half way up)",
    ),
    "tsp_rate": (
        _one_or_more(float, "float"),
        "share of the prompt that goes on behind it (default 0.2; 1 turns TSP off); falling with several layers: R,R,…",
    ),
    "kv_retention": (float, "share of the prompt whose KV each layer keeps (default 0.1; 1 keeps all)"),
    "tsp_len": (_one_or_more(int, "int"), "tokens that go on, in place of --tsp-rate"),
    "kv_len": (int, "entries that each layer keeps, in place of --kv-retention"),
    "window": (int, "last tokens, always kept, whose queries score the others (default 8)"),
    "kernel": (int, "width of the pooling of scores, odd (default 7; gemfilter 5)"),
    "pooling": (str, "max or avg (default max)"),
    "min_tokens": (int, "the rates never keep fewer tokens than this (default 128)"),
    "sinks": (int, "streamingllm: first tokens that are always kept (default 4)"),
    "recent_share": (float, "h2o: share of the budget for the most recent tokens (default 0.5)"),
    "head_floor": (float, "adakv: share of the budget that each head has for certain (default 0.2)"),
    "head_scores": (str, "headkv: JSON table of the model's heads, from fastkv-eval head-scores"),
    "beta": (float, "headkv: a head keeps 1 - 1/BETA of the budget, the rest goes by its score (default 1.35)"),
    "filter_layer": (int, "gemfilter: layer that chooses what the model reads anew (default: below half way up)"),
    "first_layer": (
        int,
        "asl, structkv, pyramidinfer: first layer that may drop tokens (default: asl 10 of 32, the others a quarter of "
        "the way up)",
    ),
    "tau": (float, "asl: tokens are dropped where ranks vary less than this, 1 being random (default 0.3)"),
    "lookback": (int, "asl: layers over which ranks are compared (default 3)"),
    "score_decay": (float, "structkv: weight of a layer's scores in the next one's (default 0.9)"),
    "decay": (float, "pyramidinfer: share of what a layer saw that goes on (default 0.9)"),
    "floor": (float, "pyramidinfer: share of the prompt that always goes on (default 0.2)"),
}
SAMPLING_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "tokens to generate at most (default 256, or what the context leaves)"),
    "temperature": (float, "0 is greedy (default), and then the next three and --seed decide nothing"),
    "top_k": (int, "sample from the K most probable tokens (default 0: all)"),
    "top_p": (float, "sample from the fewest tokens that together reach P (default 1: all)"),
    "min_p": (float, "drop tokens below P times the most probable one (default 0: none)"),
    "repetition_penalty": (float, "above 1, tokens seen before are less likely (default 1)"),
    "seed": (int, "the same seed gives the same text"),
}

_METAVARS = {
    "tsp_layer": "I",
    "tsp_rate": "R",
    "kv_retention": "R",
    "tsp_len": "N",
    "kv_len": "N",
    "window": "W",
    "kernel": "K",
    "pooling": "max|avg",
    "min_tokens": "N",
    "sinks": "N",
    "recent_share": "R",
    "head_floor": "R",
    "head_scores": "FILE",
    "beta": "B",
    "filter_layer": "I",
    "first_layer": "I",
    "tau": "T",
    "lookback": "N",
    "score_decay": "R",
    "decay": "R",
    "floor": "R",
    "max_tokens": "N",
    "temperature": "T",
    "top_k": "K",
    "top_p": "P",
    "min_p": "P",
    "repetition_penalty": "X",
    "seed": "S",
}
# What a complaint names the flag of.
SETTINGS = {
    *POLICY_FLAGS,
    *SAMPLING_FLAGS,
    *("prompt", "chat", "stop", "policy", "device", "dtype"),
    *("threads", "revision", "compile", "attention", "report"),
    *("prompts", "output", "batch_size", "kv_memory"),
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
        metavar="FILE",
        help="UTF-8 text file; - reads standard input (repeatable)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSONL of objects with prompt and, if wanted, id")
    parser.add_argument(
        "--policy",
        default="fastkv",
        metavar="NAME",
        help="fastkv (default), full, snapkv, pyramidkv, adakv, headkv, h2o, streamingllm, gemfilter, pyramidinfer, "
        "structkv, asl",
    )
    policy = parser.add_argument_group("settings of the policies; one that a policy does not have is refused")
    for name, (kind, text) in POLICY_FLAGS.items():
        policy.add_argument(flag_of(name), type=kind, help=text, metavar=_METAVARS[name])
    sampling = parser.add_argument_group("generation")
    for name, (kind, text) in SAMPLING_FLAGS.items():
        sampling.add_argument(flag_of(name), type=kind, help=text, metavar=_METAVARS[name])
    sampling.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on behind an end-of-text token")
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
        "--output", metavar="FILE", help="JSONL of the answers to several prompts; goes on where it was"
    )
    machine.add_argument("--batch-size", type=int, metavar="N", help="prompts at work at a time, with --output (8)")
    machine.add_argument("--kv-memory", type=int, metavar="MIB", help="for their KV caches (default: what there is)")
    machine.add_argument("--report", metavar="FILE", help="write a page that shows what was kept of the prompt (HTML)")
    machine.add_argument("--quiet", action="store_true", help="print no figures")
    machine.add_argument("--version", action="version", version=f"fastkv-run {__version__}")
    return parser
