"""The flags of fastkv-run, and what they say of themselves. Runs nothing."""

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
from fastkv.console.speculation import SPECULATION_SETTINGS, add_speculation_flags

# What a complaint names the flag of.
NAMED_SETTINGS = {
    *SETTINGS,
    *SAMPLING_FLAGS,
    *("prompt", "chat", "chat_arg", "stop", "stop_token", "policy", "policy_file", "device", "dtype", "weights"),
    *("kv_dtype", "share_layers", "threads", "revision", "compile", "attention", "report", "offload"),
    *("prompts", "output", "batch_size", "kv_memory", "reuse_prefix", "decode_budget"),
    *("context", "cache", "save_cache"),
    *SPECULATION_SETTINGS,
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
    add_setting_flags(parser)
    sampling = parser.add_argument_group("generation")
    add_sampling_flags(sampling)
    sampling.add_argument(
        "--decode-budget",
        type=int,
        metavar="N",
        help="entries a KV head holds while the answer grows; what is dropped is forgotten (default: all are kept)",
    )
    add_speculation_flags(sampling)
    sampling.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add_chat_flags(sampling, "system message for --chat")
    machine = parser.add_argument_group("machine and output")
    add_machine_flags(machine)
    machine.add_argument(
        "--share-layers",
        type=file_name,
        metavar="FILE",
        help="layers that read an earlier one's entries, by fastkv-eval share-layers",
    )
    add_engine_flags(machine)
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
