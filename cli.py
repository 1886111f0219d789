"""fastkv-run: a model and a prompt file in, the continuation out.

Generated text, and nothing else, goes to stdout; figures and complaints go to stderr. Heavy imports wait until the
arguments and the prompt are known to be good.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastkv import __version__
from fastkv.errors import FastKVError, check_integer

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.generation import Generation
    from fastkv.engine.job import Job
    from fastkv.engine.llm import LLM
    from fastkv.engine.output import Metrics
    from fastkv.engine.sampler import SamplingParams

DONE, FAULT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def _one_or_more(kind: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """Reads `0.2` as a value and `0.5,0.2` as a tuple; argparse calls it by that name."""

    def read(text: str) -> Any:
        values = tuple(kind(part) for part in text.split(","))
        return values if len(values) > 1 else values[0]

    read.__name__ = name
    return read


# Settings of policies: each is a field of the policies that know it.
_POLICY_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "tsp_layer": (
        _one_or_more(int, "int"),
        "layer behind whose attention tokens are dropped (default: half way up), or several: I,I,…",
    ),
    "tsp_rate": (
        _one_or_more(float, "float"),
        "share of the prompt that goes on behind it (default 0.2; 1 turns TSP off); falling with several layers: R,R,…",
    ),
    "kv_retention": (float, "share of the prompt whose KV each layer keeps (default 0.1; 1 keeps all)"),
    "tsp_len": (_one_or_more(int, "int"), "tokens that go on, in place of --tsp-rate"),
    "kv_len": (int, "entries that each layer keeps, in place of --kv-retention"),
    "window": (int, "last tokens, always kept, whose queries score the others (default 8)"),
    "kernel": (int, "width of the pooling of scores, odd (default 7)"),
    "pooling": (str, "max or avg (default max)"),
    "min_tokens": (int, "the rates never keep fewer tokens than this (default 128)"),
    "sinks": (int, "streamingllm: first tokens that are always kept (default 4)"),
    "recent_share": (float, "h2o: share of the budget for the most recent tokens (default 0.5)"),
    "first_layer": (int, "pyramidinfer: first layer that sends on fewer tokens (default: a quarter of the way up)"),
    "decay": (float, "pyramidinfer: share of what a layer saw that goes on (default 0.9)"),
    "floor": (float, "pyramidinfer: share of the prompt that always goes on (default 0.2)"),
}
_SAMPLING_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
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
    "first_layer": "I",
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
_OTHER_SETTINGS = (
    *("prompt", "chat", "stop", "policy", "device", "dtype"),
    *("threads", "revision", "compile", "attention", "report"),
    *("prompts", "output", "batch_size", "kv_memory"),
)


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        _complain(str(FastKVError(message)))  # one line, whatever the arguments hold
        sys.exit(USER_ERROR)


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


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
        help="fastkv (default), full, snapkv, pyramidkv, pyramidinfer, h2o, streamingllm",
    )
    policy = parser.add_argument_group("settings of the policies; one that a policy does not have is refused")
    for name, (kind, text) in _POLICY_FLAGS.items():
        policy.add_argument(_flag(name), type=kind, help=text, metavar=_METAVARS[name])
    sampling = parser.add_argument_group("generation")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        sampling.add_argument(_flag(name), type=kind, help=text, metavar=_METAVARS[name])
    sampling.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on behind an end-of-text token")
    sampling.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    sampling.add_argument("--system", metavar="TEXT", help="system message for --chat")
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:N")
    machine.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    machine.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, decode without captured graphs")
    machine.add_argument("--compile", action="store_true", help="torch.compile: a slow start, then a little faster")
    machine.add_argument(
        "--attention", default="auto", metavar="B", help="auto (default), cudnn, flash, efficient, math"
    )
    machine.add_argument("--revision", metavar="R", help="revision of a hub id")
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


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    try:
        return _run(build_parser().parse_args(argv))
    except FastKVError as error:
        _complain(str(error), error.setting)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()  # the reader has gone: nothing is left to say
        return DONE
    except OSError as error:
        if sys.stdout is not None:
            _drop_stdout()
        _say(f"fastkv-run: error: {error}")
        return FAULT


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that Python does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise FastKVError("--system is for --chat: add --chat, or leave it out")
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    for flag, texts in (("--system", [args.system or ""]), ("--stop", args.stop)):
        if any(map(_is_broken, texts)):
            raise FastKVError(f"{flag}: is not UTF-8")
    if sys.stdout is None:
        raise OSError("standard output is closed")
    jobs = _jobs(args)
    if args.report is not None:
        from fastkv.report.target import check_writable

        check_writable(args.report)

    import torch

    from fastkv.engine.sampler import SamplingParams

    params = SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **_given(args, _SAMPLING_FLAGS))
    policy = build_policy(args.policy, _given(args, _POLICY_FLAGS))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    llm = _load(args, policy)
    return _run_one(args, llm, jobs[0], params) if args.output is None else _run_many(args, llm, jobs, params)


def _load(args: argparse.Namespace, policy: Policy) -> LLM:
    from fastkv.engine.llm import LLM

    return LLM(
        args.model,
        policy=policy,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        cuda_graph=not args.no_cuda_graph,
        compile=args.compile,
        attention=args.attention,
    )


def _jobs(args: argparse.Namespace) -> list[Job]:
    """The prompts, and FastKVError for flags that do not go with one or with several of them."""
    from fastkv.engine.job import Job, check_names, read_jobs

    if bool(args.prompt) == (args.prompts is not None):
        raise FastKVError("the following arguments are required: --prompt or --prompts, one of the two")
    jobs = read_jobs(args.prompts) if args.prompts else [Job(name, read_prompt(name)) for name in args.prompt]
    check_names(jobs)
    if args.output is None:
        if args.prompts or len(jobs) > 1:
            raise FastKVError("several prompts need --output FILE, where their answers go")
        for name in ("batch_size", "kv_memory"):
            if getattr(args, name) is not None:
                raise FastKVError(f"{_flag(name)} is for several prompts: add --output, or leave it out")
    for flag in ("json", "report"):
        if args.output is not None and getattr(args, flag):
            raise FastKVError(f"{_flag(flag)} is for one prompt on standard output: leave it or --output out")
    return jobs


def _run_one(args: argparse.Namespace, llm: LLM, job: Job, params: SamplingParams) -> int:
    """The answer to standard output, as it is made."""
    stream = llm.stream(_prompt(args, llm, job), params, keep_selection=args.report is not None)
    status = _print_json(llm, stream) if args.json else _print_text(stream)
    if not args.quiet:
        _print_figures(llm, stream.output().metrics)
    if args.report is not None:
        _write_report(args.report, llm, stream)
    return status


def _run_many(args: argparse.Namespace, llm: LLM, jobs: list[Job], params: SamplingParams) -> int:
    """The answers into a file, those left out that are there."""
    from fastkv.engine.job import run_jobs

    limits: dict[str, Any] = {} if args.batch_size is None else {"batch_size": args.batch_size}
    if args.kv_memory is not None:
        check_integer("kv_memory", args.kv_memory, 1)
        limits["kv_memory"] = args.kv_memory * 2**20
    about = {"model": args.model, "chat": args.chat, "system": args.system}
    line = run_jobs(llm, jobs, lambda job: _prompt(args, llm, job), params, args.output, about, limits)
    if not args.quiet:
        _say(line)
    return DONE


def read_prompt(name: str) -> str:
    """The text of a prompt file ("-": standard input), verbatim but for a byte-order mark and one last newline.

    Raises FastKVError for a file that is missing, empty, binary or not UTF-8.
    """
    source = "standard input" if name == "-" else name
    if name == "-" and sys.stdin is None:
        raise FastKVError(f"--prompt {source}: is closed")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise FastKVError(f"--prompt {source}: cannot be read ({error.strerror})") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FastKVError(f"--prompt {source}: is UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise FastKVError(f"--prompt {source}: is a binary file; give a text file in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastKVError(f"--prompt {source}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    text = text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise FastKVError(f"--prompt {source}: is empty")
    return text


def _is_broken(text: str) -> bool:
    """Whether an argument held bytes that are no UTF-8: Python hands them on as lone surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def build_policy(name: str, settings: dict[str, Any]) -> Policy:
    """The policy of that name with these settings; FastKVError for an unknown name or a setting it does not have."""
    from fastkv.cache.policies import POLICIES

    if name not in POLICIES:
        raise FastKVError(f"policy must be one of {', '.join(POLICIES)}, not {name!r}", setting="policy")
    policy = POLICIES[name]
    known = {field.name for field in dataclasses.fields(policy)}  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise FastKVError(f"{_flag(setting)} is no setting of --policy {name}; leave one of them out")
    return policy(**settings)


def _given(args: argparse.Namespace, flags: dict[str, tuple[Callable[[str], Any], str]]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in flags if getattr(args, name) is not None}


def _prompt(args: argparse.Namespace, llm: LLM, job: Job) -> str | list[int]:
    """The prompt as the model is to see it."""
    if not args.chat:
        return job.prompt
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    return llm.chat([*messages, {"role": "user", "content": job.prompt}])


def _print_text(stream: Generation) -> int:
    """Write the text as it is made. Ctrl-C keeps what is there."""
    status = DONE
    ended = "\n"
    _write_utf8()
    try:
        for piece in stream:
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                ended = piece.text
    except KeyboardInterrupt:
        status = INTERRUPTED
    if sys.stdout.isatty() and not ended.endswith("\n"):
        _say("")  # the figures begin on a line of their own, and stdout stays the text alone
    return status


def _print_json(llm: LLM, stream: Generation) -> int:
    status = DONE
    _write_utf8()
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        status = INTERRUPTED
    from fastkv.engine.summary import as_json

    print(json.dumps(as_json(llm, stream.output()), ensure_ascii=False), flush=True)
    return status


def _print_figures(llm: LLM, metrics: Metrics) -> None:
    from fastkv.engine.summary import figures

    for label, value in figures(llm, metrics):
        _say(f"{label:<12} {value}")


def _write_report(path: str, llm: LLM, stream: Generation) -> None:
    """The page of what was kept; an answer that was interrupted has one, too, once the prompt has been read."""
    if stream.selection is None:
        return
    from fastkv.report.data import report_of
    from fastkv.report.page import write_report

    tokens, kept = stream.selection
    write_report(path, report_of(llm, stream.prompt_ids, tokens, kept, stream.output()))


def _complain(message: str, setting: str | None = None) -> None:
    """One line on stderr, naming the flag of the setting at fault."""
    flags = {*_POLICY_FLAGS, *_SAMPLING_FLAGS, *_OTHER_SETTINGS}
    prefix = f"{_flag(setting)}: " if setting in flags and setting is not None else ""
    _say(f"fastkv-run: error: {prefix}{message}")


def _say(line: str) -> None:
    if sys.stderr is not None:  # closed: print would turn to stdout
        print(line, file=sys.stderr)


def _write_utf8() -> None:
    """Text is UTF-8 wherever it goes, whatever the locale says; and newlines stay as the model wrote them."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="replace", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
