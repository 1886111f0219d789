"""The flags of fastkv-batch, and what they say of themselves. Runs nothing."""

from __future__ import annotations

from fastkv import __version__
from fastkv.cache.catalogue import POLICIES, SETTINGS
from fastkv.console.parser import Parser, add_machine_flags, add_model_flag, file_name
from fastkv.console.run_flags import (
    SAMPLING_FLAGS,
    add_chat_flags,
    add_engine_flags,
    add_sampling_flags,
    add_setting_flags,
)

NAME = "fastkv-batch"
SHARD_SIZE = 32

# What a complaint names the flag of.
NAMED_SETTINGS = {
    *SETTINGS,
    *SAMPLING_FLAGS,
    *("chat", "chat_arg", "system", "stop", "stop_token", "policy", "policy_file", "device", "dtype", "weights"),
    *("kv_dtype", "share_layers", "threads", "revision", "compile", "attention", "decode_budget"),
    *("prompts", "output", "workers", "shard_size", "address", "gpus_per_worker"),
    *("batch_size", "kv_memory", "reuse_prefix"),
}


def build_parser() -> Parser:
    """Every flag of the command. Unset settings are None, so that the library's own defaults hold."""
    parser = Parser(
        prog=NAME,
        description="Answer many prompts with several engines at once, on one machine or a cluster, through Ray.",
    )
    add_model_flag(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        type=file_name,
        metavar="FILE",
        help="JSONL of objects with prompt and, if wanted, id",
    )
    parser.add_argument(
        "--output", required=True, type=file_name, metavar="FOLDER", help="for the answers; resumes where it stopped"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="engines at work (default: one for each GPU, or one on the CPUs)"
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=SHARD_SIZE,
        metavar="N",
        help=f"prompts whose answers are one file, and are done again if a worker dies ({SHARD_SIZE})",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=", ".join(f"{name} (default)" if name == "fastkv" else name for name in POLICIES),
    )
    parser.add_argument(
        "--policy-file", type=file_name, metavar="FILE", help="policy and settings of a file by fastkv-eval tune"
    )
    add_setting_flags(parser)
    sampling = parser.add_argument_group("generation")
    add_sampling_flags(sampling)
    sampling.add_argument(
        "--decode-budget", type=int, metavar="N", help="entries a KV head holds while an answer grows (default: all)"
    )
    sampling.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    add_chat_flags(sampling, "system message for --chat")
    machine = parser.add_argument_group("machine and output")
    machine.add_argument(
        "--address", metavar="A", help="Ray cluster to work on, or auto (default: $RAY_ADDRESS, or one of its own here)"
    )
    machine.add_argument(
        "--gpus-per-worker", type=float, metavar="X", help="share of a GPU, at most 1 (default: 1 where there are GPUs)"
    )
    add_machine_flags(machine, quiet="print no figures")
    machine.add_argument(
        "--share-layers",
        type=file_name,
        metavar="FILE",
        help="layers that read an earlier one's entries, by fastkv-eval share-layers",
    )
    add_engine_flags(machine)
    machine.add_argument("--batch-size", type=int, metavar="N", help="prompts at work at a time in an engine (8)")
    machine.add_argument("--kv-memory", type=int, metavar="MIB", help="for their KV caches (default: what there is)")
    machine.add_argument(
        "--reuse-prefix",
        action="store_true",
        default=None,
        help="prompts of a shard that begin alike: compress that once, keep the rest whole",
    )
    machine.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    return parser
