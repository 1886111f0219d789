"""The flags of fastkv-chat, and what they say of themselves. Runs nothing."""

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

# What a complaint names the flag of.
NAMED_SETTINGS = {
    *SETTINGS,
    *SAMPLING_FLAGS,
    *("system", "chat_arg", "stop", "stop_token", "policy", "policy_file", "cache", "device", "dtype", "weights"),
    *("kv_dtype", "threads", "revision", "compile", "attention", "offload"),
}


def build_parser() -> Parser:
    """Every flag of the command. Unset settings are None, so that the library's own defaults hold."""
    parser = Parser(
        prog="fastkv-chat",
        description="Talk with a model, in a terminal or line by line from a pipe; /help there lists the commands.",
    )
    add_model_flag(parser)
    parser.add_argument("--cache", type=file_name, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=f"what is kept of what is read: {', '.join(POLICIES)} (default: that of LLM.session, told as it begins)",
    )
    parser.add_argument(
        "--policy-file", type=file_name, metavar="FILE", help="policy and settings of a file by fastkv-eval tune"
    )
    add_setting_flags(parser)
    sampling = parser.add_argument_group("answers")
    add_sampling_flags(sampling)
    add_chat_flags(sampling, "system message, before all others")
    machine = parser.add_argument_group("machine and output")
    add_machine_flags(machine, quiet="say nothing but answers, complaints and what is asked for")
    add_engine_flags(machine)
    machine.add_argument("--version", action="version", version=f"fastkv-chat {__version__}")
    return parser
