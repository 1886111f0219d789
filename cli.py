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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.cache.catalogue import SETTINGS
from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.setting import settings_of
from fastkv.cli_flags import NAMED_SETTINGS, build_parser
from fastkv.console.asked import Asked, print_figures
from fastkv.console.chat_flags import chat_arguments, stop_token_ids
from fastkv.console.document import Document, check_save_cache, document_of
from fastkv.console.files import check_writable
from fastkv.console.job import about_flags, named, run_jobs
from fastkv.console.jsonl import check_output
from fastkv.console.load import load_by_flags
from fastkv.console.parser import DONE, INTERRUPTED, check_stdout, drop_stdout, flag_of, guarded, say, write_utf8
from fastkv.console.policy_file import read_policy_file
from fastkv.console.policy_text import build_policy
from fastkv.console.prompt import Job, check_names, is_broken, read_jobs, read_prompt
from fastkv.console.ranks import check_alike, check_rank_flags
from fastkv.console.run_flags import SAMPLING_FLAGS, given_flags
from fastkv.console.sharing import check_share_layers
from fastkv.console.speculation import named_as_typed, speculation_of, stream_arguments
from fastkv.console.summary import as_json, kernels
from fastkv.console.tuned import tuned_policy
from fastkv.errors import FastKVError, brief, check_integer, writable
from fastkv.kernels.torchrun import rank, world_size

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.generation import Generation
    from fastkv.engine.llm import LLM
    from fastkv.engine.sampler import SamplingParams
    from fastkv.engine.turn import Turn


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    return guarded("fastkv-run", lambda: _run(build_parser().parse_args(argv)), NAMED_SETTINGS, takes_ranks=True)


def _run(args: argparse.Namespace) -> int:
    args.chat_arg = chat_arguments(args.chat_arg)
    for flag in ("system", "chat_arg"):
        if getattr(args, flag) not in (None, {}) and not args.chat:
            raise FastKVError(f"{flag_of(flag)} is for --chat: add --chat, or leave it out")
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    for flag, texts in _texts_of(args).items():
        if any(map(is_broken, texts)):
            raise FastKVError(f"{flag}: is not UTF-8")
    check_stdout()
    check_rank_flags(args)
    check_share_layers(args)
    if args.policy is not None and args.policy_file is not None:
        raise FastKVError("--policy-file names a policy already: leave it or --policy out")
    document = document_of(args)
    jobs = _jobs(args, document)
    if args.decode_budget is not None:
        DecodeBudget(args.decode_budget)
        if document is not None:
            named = "--cache" if args.context is None else "--context"
            raise FastKVError(f"--decode-budget does not go with {named}, where what comes later is kept: leave it out")
    speculation = speculation_of(args, document is not None)
    _check_targets(args)

    from fastkv.engine.sampler import SamplingParams

    params = SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **given_flags(args, SAMPLING_FLAGS))
    given = given_flags(args, SETTINGS)
    file = None if args.policy_file is None else read_policy_file(Path(args.policy_file))
    policy = _policy(args.policy, given, document) if file is None else file.build(given)
    # What is remembered was found for prompts that end with their question: not for a document before it.
    looks = args.policy is None and (file is not None or document is None)
    tuned = tuned_policy(args.model, args.revision, file) if looks else None
    policy = policy if tuned is None else tuned.build(given)
    source = [] if tuned is None else [("tuned", tuned.told(given))]
    try:
        llm = load_by_flags(args, policy)
    except FastKVError as error:
        raise error if tuned is None else tuned.blamed(error, given) from None
    check_alike(llm.ranks, llm.device, [jobs, document, policy, params])
    params = dataclasses.replace(params, stop_token_ids=stop_token_ids(llm, args.stop_token))
    asked = Asked(args, llm, document, source)
    if args.output is not None:
        status = _run_many(args, asked, jobs, params)
    elif len(jobs) == 1:
        with named_as_typed(args):
            status = _run_one(args, asked, jobs[0], params, stream_arguments(speculation))
    else:
        status = _run_in_turn(args, asked, jobs, params)
    if args.verbose:
        print_figures(kernels())
    return status


def _texts_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """The flags that are texts, for the model or the hub."""
    return {
        "--revision": [args.revision or ""],
        "--system": [args.system or ""],
        "--stop": args.stop,
        "--stop-token": args.stop_token,
        "--chat-arg": [json.dumps(args.chat_arg, ensure_ascii=False)],
    }


def _policy(name: str | None, given: dict[str, Any], document: Document | None) -> Policy:
    """The policy of that name with the settings `given`; None: the default, which for a document is the session's."""
    if name is not None or document is None:
        return build_policy("fastkv" if name is None else name, given)
    from fastkv.engine.session import DEFAULT_POLICY

    own = {setting: getattr(DEFAULT_POLICY, setting) for setting in settings_of(type(DEFAULT_POLICY))}
    return build_policy(DEFAULT_POLICY.name, {**own, **given})


def _check_targets(args: argparse.Namespace) -> None:
    """FastKVError unless what is to be written can be. Of several ranks the first one writes."""
    if rank() > 0:
        return
    if args.output is not None:
        check_output(args.output)
    if args.report is not None:
        check_writable(args.report, "report")
    if args.save_cache is not None:
        check_save_cache(args.save_cache, [args.context, *args.prompt, args.prompts, args.policy_file, args.output])
    if args.report is not None and any(_is_same_file(args.report, prompt) for prompt in args.prompt):
        raise FastKVError(f"--report: {args.report}: is the prompt, which it would overwrite; take another file")


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _jobs(args: argparse.Namespace, document: Document | None) -> list[Job]:
    """The prompts, and FastKVError for flags that do not go with none, with one or with several of them."""
    if args.save_cache is not None and not args.prompt and args.prompts is None:
        _check_asks_nothing(args)
        return []
    if bool(args.prompt) == (args.prompts is not None):
        raise FastKVError("the following arguments are required: --prompt or --prompts, one of the two")
    for flag in ("prompts", "output", "report"):
        if getattr(args, flag) in ("", "-"):
            raise FastKVError(f"{flag_of(flag)} takes the name of a file, not {brief(getattr(args, flag))}")
    if args.prompts is None:
        jobs = [Job(writable(name), read_prompt(name)) for name in args.prompt]
        check_names(jobs, "prompt")
    else:
        jobs = read_jobs(args.prompts)
    for name in ("batch_size", "kv_memory"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1)
    if args.output is None:
        if document is None and (args.prompts is not None or len(jobs) > 1):
            raise FastKVError("several prompts need --output FILE, where their answers go")
        for name in ("batch_size", "kv_memory", "reuse_prefix"):
            if getattr(args, name) is not None:
                raise FastKVError(f"{flag_of(name)} is for several prompts: add --output, or leave it out")
        if args.json and len(jobs) > 1:
            raise FastKVError("--json is for one prompt on standard output: for several, take --output instead")
    for flag in ("json", "report"):
        if args.output is not None and getattr(args, flag):
            raise FastKVError(f"{flag_of(flag)} is for one prompt on standard output: leave it or --output out")
    return jobs


def _check_asks_nothing(args: argparse.Namespace) -> None:
    """FastKVError for flags that are for an answer, where nothing is asked."""
    for name in ("json", "output", "batch_size", "kv_memory", "stop", "stop_token", "ignore_eos", *SAMPLING_FLAGS):
        value = getattr(args, name)
        if not (value is None or value is False or value == []):
            raise FastKVError(f"{flag_of(name)} is for an answer: add --prompt, or leave it out")


def _run_one(
    args: argparse.Namespace, asked: Asked, job: Job, params: SamplingParams, speculation: dict[str, Any]
) -> int:
    """The answer to standard output, as it is made."""
    prompt, shows = asked.prompt(job), args.report is not None
    limits = {"keep_selection": shows, "decode_budget": args.decode_budget}
    stream = asked.llm.stream(prompt, params, **limits, **speculation)
    status = _print_json(stream) if args.json else _print_text(stream)
    asked.print_figures(stream)
    if args.report is not None:
        _write_report(args.report, asked.llm, stream)
    return status


def _run_in_turn(args: argparse.Namespace, asked: Asked, jobs: list[Job], params: SamplingParams) -> int:
    """The answers to standard output, one after another, a newline after each; its name before it on stderr.

    Without any jobs the document is read, and nothing is asked. Every prompt is checked before the first one runs.
    """
    asked.session()
    prompts = [_checked(asked, job, params) for job in jobs]
    for job, prompt in zip(jobs, prompts, strict=True):
        if not args.quiet:
            say(job.id)
        stream = asked.llm.stream(prompt, params)
        status = _print_text(stream, ends="\n")
        asked.print_figures(stream)
        if status != DONE:
            return status
    return DONE


def _checked(asked: Asked, job: Job, params: SamplingParams) -> str | list[int] | Turn:
    try:
        prompt = asked.prompt(job)
        asked.llm.stream(prompt, params)
    except FastKVError as error:
        raise named(job, error, error.setting) from None
    return prompt


def _run_many(args: argparse.Namespace, asked: Asked, jobs: list[Job], params: SamplingParams) -> int:
    """The answers into a file, those left out that are there."""
    limits: dict[str, Any] = {"decode_budget": args.decode_budget}
    if args.batch_size is not None:
        limits["batch_size"] = args.batch_size
    if args.kv_memory is not None:
        limits["kv_memory"] = args.kv_memory * 2**20
    limits["reuse_prefix"] = args.reuse_prefix
    about = about_flags(args)
    try:
        if args.save_cache is not None:
            asked.session()
        about |= asked.about()
        line = run_jobs(asked.llm, jobs, asked.prompt, params, args.output, about, limits)
    except KeyboardInterrupt:
        status, line = INTERRUPTED, f"stopped; the same command continues after the answers that are in {args.output}"
    else:
        status = DONE
    if not args.quiet:
        print_figures([] if asked.is_of_a_document else asked.source)
        say(line)
    return status


def _print_text(stream: Generation, ends: str = "") -> int:
    """Write the text as it is made, and `ends` after it. Ctrl-C keeps what is there."""
    status = DONE
    ended = "\n"
    write_utf8(newline="\n")  # newlines stay as the model wrote them
    try:
        for piece in stream:
            if piece.text:
                _write(piece.text)
                ended = piece.text
    except KeyboardInterrupt:
        status = INTERRUPTED
    if ends:
        sys.stdout.write(ends)
        sys.stdout.flush()
    elif sys.stdout.isatty() and not ended.endswith("\n"):
        say("")  # the figures begin on a line of their own, and stdout stays the text alone
    return status


def _write(text: str) -> None:
    """To standard output. Of several ranks one cannot stop alone because its reader has gone: it goes on unread."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        if world_size() == 1:
            raise
        drop_stdout()


def _print_json(stream: Generation) -> int:
    status = DONE
    write_utf8(newline="\n")  # newlines stay as the model wrote them
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        status = INTERRUPTED
    print(json.dumps(as_json(stream.output()), ensure_ascii=False), flush=True)
    return status


def _write_report(path: str, llm: LLM, stream: Generation) -> None:
    """The page of what was kept; an answer that was interrupted has one, too, once the prompt has been read."""
    if stream.selection is None:
        return
    from fastkv.report.data import report_of
    from fastkv.report.page import write_report

    tokens, kept = stream.selection
    write_report(path, report_of(llm, stream.prompt_ids, tokens, kept, stream.output()))


if __name__ == "__main__":
    sys.exit(main())
