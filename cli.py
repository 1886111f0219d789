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
from typing import TYPE_CHECKING, Any

from fastkv.cli_flags import (
    DONE,
    FAULT,
    INTERRUPTED,
    POLICY_FLAGS,
    SAMPLING_FLAGS,
    USER_ERROR,
    build_parser,
    complain,
    flag_of,
    say,
)
from fastkv.errors import FastKVError, check_integer

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.generation import Generation
    from fastkv.engine.job import Job
    from fastkv.engine.llm import LLM
    from fastkv.engine.output import Output
    from fastkv.engine.sampler import SamplingParams


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    try:
        return _run(build_parser().parse_args(argv))
    except FastKVError as error:
        complain(str(error), error.setting)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()  # the reader has gone: nothing is left to say
        return DONE
    except OSError as error:
        if sys.stdout is not None:
            _drop_stdout()
        say(f"fastkv-run: error: {error}")
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
    _check_targets(args)

    import torch

    from fastkv.engine.sampler import SamplingParams

    params = SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **_given(args, SAMPLING_FLAGS))
    policy = build_policy(args.policy, _given(args, POLICY_FLAGS))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    llm = _load(args, policy)
    return _run_one(args, llm, jobs[0], params) if args.output is None else _run_many(args, llm, jobs, params)


def _check_targets(args: argparse.Namespace) -> None:
    """FastKVError unless what is to be written can be."""
    from fastkv.engine.files import check_writable

    for name in ("report", "output"):
        path = getattr(args, name)
        if path is not None:
            check_writable(path, name)
    if args.report is not None and any(_is_same_file(args.report, prompt) for prompt in args.prompt):
        raise FastKVError(f"--report: {args.report}: is the prompt, which it would overwrite; take another file")


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


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
    for flag in ("prompts", "output", "report"):
        if getattr(args, flag) in ("", "-"):
            raise FastKVError(f"{flag_of(flag)} takes the name of a file, not {getattr(args, flag)!r}")
    if args.prompts is None:
        jobs = [Job(name, read_prompt(name)) for name in args.prompt]
        check_names(jobs, "prompt")
    else:
        jobs = read_jobs(args.prompts)
    for name in ("batch_size", "kv_memory"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1)
    if args.output is None:
        if args.prompts is not None or len(jobs) > 1:
            raise FastKVError("several prompts need --output FILE, where their answers go")
        for name in ("batch_size", "kv_memory"):
            if getattr(args, name) is not None:
                raise FastKVError(f"{flag_of(name)} is for several prompts: add --output, or leave it out")
    for flag in ("json", "report"):
        if args.output is not None and getattr(args, flag):
            raise FastKVError(f"{flag_of(flag)} is for one prompt on standard output: leave it or --output out")
    return jobs


def _run_one(args: argparse.Namespace, llm: LLM, job: Job, params: SamplingParams) -> int:
    """The answer to standard output, as it is made."""
    stream = llm.stream(_prompt(args, llm, job), params, keep_selection=args.report is not None)
    status = _print_json(stream) if args.json else _print_text(stream)
    if not args.quiet:
        _print_figures(stream.output())
    if args.report is not None:
        _write_report(args.report, llm, stream)
    return status


def _run_many(args: argparse.Namespace, llm: LLM, jobs: list[Job], params: SamplingParams) -> int:
    """The answers into a file, those left out that are there."""
    from fastkv.engine.job import run_jobs

    limits: dict[str, Any] = {} if args.batch_size is None else {"batch_size": args.batch_size}
    if args.kv_memory is not None:
        limits["kv_memory"] = args.kv_memory * 2**20
    about = {"model": args.model, "chat": args.chat, "system": args.system}
    try:
        line = run_jobs(llm, jobs, lambda job: _prompt(args, llm, job), params, args.output, about, limits)
    except KeyboardInterrupt:
        status, line = INTERRUPTED, f"stopped; the same command goes on behind the answers that are in {args.output}"
    else:
        status = DONE
    if not args.quiet:
        say(line)
    return status


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
            raise FastKVError(f"{flag_of(setting)} is no setting of --policy {name}; leave one of them out")
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
        say("")  # the figures begin on a line of their own, and stdout stays the text alone
    return status


def _print_json(stream: Generation) -> int:
    status = DONE
    _write_utf8()
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        status = INTERRUPTED
    from fastkv.engine.summary import as_json

    print(json.dumps(as_json(stream.output()), ensure_ascii=False), flush=True)
    return status


def _print_figures(output: Output) -> None:
    from fastkv.engine.summary import figures

    for label, value in figures(output):
        say(f"{label:<12} {value}")


def _write_report(path: str, llm: LLM, stream: Generation) -> None:
    """The page of what was kept; an answer that was interrupted has one, too, once the prompt has been read."""
    if stream.selection is None:
        return
    from fastkv.report.data import report_of
    from fastkv.report.page import write_report

    tokens, kept = stream.selection
    write_report(path, report_of(llm, stream.prompt_ids, tokens, kept, stream.output()))


def _write_utf8() -> None:
    """Text is UTF-8 wherever it goes, whatever the locale says; and newlines stay as the model wrote them."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="replace", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
