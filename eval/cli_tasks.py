"""The task run of fastkv-eval: what its flags mean. Heavy imports wait until the flags are good."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.console.parser import DONE, INTERRUPTED, say
from fastkv.errors import FastKVError, check_integer, check_number
from fastkv.eval.cli_flags import DEFAULT_EXAMPLES, DEFAULT_LENGTHS, DEFAULT_POLICIES
from fastkv.eval.example import Task
from fastkv.eval.policy_spec import PolicySpec, parse_policies
from fastkv.eval.tasks import build_tasks

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM
    from fastkv.eval.results import Results
    from fastkv.eval.runner import Plan


def run(args: argparse.Namespace) -> int:
    """Run the tasks and print the tables, also of a run that is interrupted; the exit status."""
    check(args)
    tasks = build_tasks(args.task, args.qa_file, args.longbench)
    _check_lengths(args, tasks)
    specs = parse_policies(args.policy or DEFAULT_POLICIES)

    from fastkv.eval.table import render

    llm, folder = load(args)
    specs = parse_policies([spec.label for spec in specs], llm.config.n_layers)
    plan = plan_of(args, tasks, llm.config.context_length)
    results, status = ask(args, llm, folder, plan, specs)
    labels = [spec.label for spec in specs]
    print(render(results.records, labels), end="", flush=True)
    say_missing(args, len(plan.slots()) * len(labels) - len(results.records))
    if args.plots is not None:
        from fastkv.eval.plots import draw_plots

        say_written(args, draw_plots(results.records, labels, args.plots))
    return status


def load(args: argparse.Namespace) -> tuple[LLM, Path]:
    """The model that the flags name, and its folder."""
    import torch

    from fastkv.engine.llm import LLM
    from fastkv.models.hub import model_folder

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.revision)
    return LLM(folder, dtype=args.dtype, device=args.device), folder


def ask(
    args: argparse.Namespace,
    llm: LLM,
    folder: Path,
    plan: Plan,
    specs: list[PolicySpec],
    notes: Iterable[str] = (),
) -> tuple[Results, int]:
    """Put every question to every policy, but for those that --output holds; all answers, and the exit status.

    notes: what to say once nothing can be wrong any more.
    """
    from fastkv.eval.header import describe
    from fastkv.eval.progress import ProgressLine
    from fastkv.eval.prompts import Prompts
    from fastkv.eval.results import Results
    from fastkv.eval.runner import Runner

    runner = Runner(llm, plan, specs, Prompts(llm, args.chat))
    about = {"model": args.model, "revision": args.revision, "chat": args.chat}
    results = Results({**about, **describe(llm, folder, plan, specs)}, args.output)
    status = DONE
    progress = ProgressLine(None if args.quiet else sys.stderr, results.resumed)
    for line in () if args.quiet else notes:
        say(line)
    if results.resumed and not args.quiet:
        say(f"{args.output}: going on behind {results.resumed} records" + " (the last line was cut off)" * results.torn)
    try:
        if len(results.records) < len(plan.slots()) * len(specs):
            runner.warm_up()
        runner.run(results, progress.show)
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        progress.clear()
        results.close()
    return results, status


def check(args: argparse.Namespace) -> None:
    """FastKVError for a number out of range, and for what could not be written at the end."""
    for length in args.length or []:
        check_integer("length", length, 1)
    for depth in args.depth:
        check_number("depth", depth, 0, 1)
    for name in ("examples", "max_tokens", "longbench_tokens", "threads"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1, 4096 if name == "threads" else None)
    if args.output is not None and not args.output.parent.is_dir():
        raise FastKVError(f"--output {args.output}: there is no folder {args.output.parent}")
    if args.plots is not None:
        from fastkv.eval.plots import check_folder, check_matplotlib

        check_matplotlib()
        check_folder(args.plots)


def _check_lengths(args: argparse.Namespace, tasks: list[Task]) -> None:
    if args.length and not any(task.has_length for task in tasks):
        raise FastKVError(
            "LongBench's prompts have lengths of their own; --longbench-tokens cuts them", setting="length"
        )
    if args.longbench_tokens is not None and all(task.has_length for task in tasks):
        raise FastKVError("is for --task longbench: add it, or leave it out", setting="longbench_tokens")


def plan_of(args: argparse.Namespace, tasks: list[Task], context: int) -> Plan:
    """The examples that the flags ask for; lengths that are not said are those that fit the context."""
    from fastkv.eval.runner import Plan

    answers = [task.max_new_tokens if args.max_tokens is None else args.max_tokens for task in tasks if task.has_length]
    lengths = args.length or [length for length in DEFAULT_LENGTHS if length + max(answers, default=0) <= context]
    if answers and not lengths:
        raise FastKVError(f"the model's context is {context} tokens; say which lengths fit it", setting="length")
    return Plan(
        tasks=tuple(tasks),
        lengths=tuple(sorted(set(lengths))) if answers else (),
        depths=tuple(sorted(set(args.depth))),
        examples=args.examples or DEFAULT_EXAMPLES,
        seed=args.seed,
        max_tokens=args.max_tokens,
        longbench_examples=args.examples,
        longbench_tokens=args.longbench_tokens,
    )


def say_missing(args: argparse.Namespace, missing: int) -> None:
    """A word on a run that is not complete."""
    if missing and not args.quiet:
        kept = (
            f"the same command goes on from {args.output}" if args.output else "nothing was kept, for want of --output"
        )
        say(f"interrupted with {missing} answers to go: {kept}")


def say_written(args: argparse.Namespace, paths: Iterable[Path]) -> None:
    """A line for each file that is there now."""
    for path in paths:
        if not args.quiet:
            say(f"wrote {path}")
