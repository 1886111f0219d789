"""The task run of fastkv-eval, and what the other commands share with it: the model, the plan, the answers."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch

from fastkv.cache.layer_map import read_map
from fastkv.console.load import load_model
from fastkv.console.machine import fingerprint, machine
from fastkv.console.parser import DONE, INTERRUPTED, say
from fastkv.console.progress import ProgressLine
from fastkv.console.words import counted
from fastkv.engine.llm import LLM
from fastkv.errors import FastKVError, writable
from fastkv.eval.policy_spec import PolicySpec, parse_policies
from fastkv.eval.results import Record, Results
from fastkv.eval.runner import Plan, Report, Runner
from fastkv.eval.table import render
from fastkv.models.hub import model_folder

DEFAULT_POLICIES = ["full", "fastkv"]
DEFAULT_LENGTHS = (1024, 2048, 4096)
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_EXAMPLES = 5


def run(args: argparse.Namespace) -> int:
    """Run the tasks and print the tables, also of a run that is interrupted; the exit status."""
    texts = args.policy or DEFAULT_POLICIES
    labels = [spec.label for spec in parse_policies(texts, kv_dtype=args.kv_dtype)]  # before the model is loaded
    llm, folder = load(args)
    plan = plan_of(args, llm.config.context_length)
    results, missing = ask(args, llm, folder, plan, parse_policies(texts, llm.config.n_layers, args.kv_dtype))
    status = conclude(args, render(results.records, labels), missing)
    if args.plots is not None:
        from fastkv.eval.plots import draw_plots

        tell(args, *(f"wrote {path}" for path in draw_plots(results.records, labels, args.plots)))
    return status


def load(args: argparse.Namespace) -> tuple[LLM, Path]:
    """The model that the flags name, and its folder."""
    folder = model_folder(args.model, args.revision)
    stored = {"dtype": args.dtype, "weights": args.weights, "kv_dtype": args.kv_dtype}
    return load_model(folder, args.threads, device=args.device, **stored), folder


def plan_of(args: argparse.Namespace, context: int) -> Plan:
    """The examples that the flags ask for; lengths that are not given are those that fit the context."""
    tasks = args.tasks
    answers = [task.max_new_tokens if args.max_tokens is None else args.max_tokens for task in tasks if task.has_length]
    lengths = args.length or [length for length in DEFAULT_LENGTHS if length + max(answers, default=0) <= context]
    if answers and not lengths:
        raise FastKVError(f"the model's context is {context} tokens; say which lengths fit it", setting="length")
    return Plan(
        tasks=tuple(tasks),
        lengths=tuple(sorted(set(lengths))) if answers else (),
        depths=tuple(sorted(set(args.depth or DEFAULT_DEPTHS))),
        examples=args.examples or DEFAULT_EXAMPLES,
        seed=args.seed or 0,
        max_tokens=args.max_tokens,
        longbench_examples=args.examples,
        longbench_tokens=args.longbench_tokens,
    )


def ask(
    args: argparse.Namespace, llm: LLM, folder: Path, plan: Plan, specs: list[PolicySpec], notes: Iterable[str] = ()
) -> tuple[Results, int]:
    """Put every question to every policy, but for those that --output holds; all answers, and how many are missing.

    notes: what to say once nothing can be wrong any more.
    """
    runner = Runner(llm, plan, specs, args.chat, not args.no_lead, args.question_after)
    about = {"model": writable(args.model), "revision": args.revision, "chat": args.chat, "no_lead": args.no_lead}
    about |= {"question_after": True} if args.question_after else {}  # files of before know the other mode alone
    results = Results({**about, **describe(llm, folder, plan, specs)}, args.output)
    total = len(plan.slots()) * len(specs)
    collect(args, runner, results, total, notes)
    return results, total - len(results.records)


class Asker(Protocol):
    """What puts questions to policies, and adds what `results` lacks."""

    def warm_up(self) -> None: ...

    def run(self, results: Results, report: Report) -> None: ...


def collect(args: argparse.Namespace, runner: Asker, results: Results, total: int, notes: Iterable[str] = ()) -> None:
    """Let a runner answer what is missing of `total` records, with a progress line; Ctrl-C ends it early."""
    resumed = (
        f"{args.output}: continues after {counted(results.resumed, 'record')}"
        + " (the last line was cut off)" * results.torn
    )
    tell(args, *notes, *([resumed] if results.resumed else ()))
    scores: dict[str, list[float]] = {}
    with ProgressLine(None if args.quiet else sys.stderr, results.resumed) as progress:

        def show(record: Record, done: int, total: int) -> None:
            scores.setdefault(record.policy, []).append(record.score)
            standings = ", ".join(f"{label} {100 * fmean(some):.1f} %" for label, some in scores.items())
            progress.show(f"{done} of {total}", done, total, f"   {standings}")

        try:
            if len(results.records) < total:
                runner.warm_up()
            runner.run(results, show)
        except KeyboardInterrupt:
            pass
        finally:
            results.close()


def describe(llm: LLM, folder: Path, plan: Plan, specs: Sequence[PolicySpec]) -> dict[str, Any]:
    """Everything that decides what a run finds: date, model files, machine, versions, examples and policies."""
    return {
        **surroundings(llm, folder),
        "tasks": [task.name for task in plan.tasks],
        "sources": {task.name: task.source for task in plan.tasks if task.source is not None},
        "lengths": plan.lengths,
        "depths": plan.depths,
        "examples": plan.examples,
        "seed": plan.seed,
        "max_tokens": plan.max_tokens,
        "longbench_examples": plan.longbench_examples,
        "longbench_tokens": plan.longbench_tokens,
        "policies": described(llm, specs),
    }


def surroundings(llm: LLM, folder: Path) -> dict[str, Any]:
    """Date, model files, machine and versions."""
    return {
        "date": date.today().isoformat(),
        "files": fingerprint(folder),
        **machine(llm),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def described(llm: LLM, specs: Sequence[PolicySpec]) -> list[dict[str, Any]]:
    """The policies with all their settings."""
    found = [{"label": one.label, "name": one.policy.name, **one.policy.settings(llm.config.n_layers)} for one in specs]
    for one, told in zip(specs, found, strict=True):
        if one.share_layers is not None:  # what the file says, wherever it is
            told["shared_layers"] = read_map(one.share_layers).pairs
    return found


def conclude(args: argparse.Namespace, tables: str, missing: int) -> int:
    """Print the tables, and a word on a run that is not complete; the exit status."""
    print(tables, end="", flush=True)
    kept = f"the same command continues in {args.output}" if args.output else "nothing was kept: there is no --output"
    tell(args, *[f"interrupted with {counted(missing, 'answer')} to go: {kept}"] * bool(missing))
    return INTERRUPTED if missing else DONE


def tell(args: argparse.Namespace, *lines: str) -> None:
    """Lines on stderr, but for --quiet."""
    for line in () if args.quiet else lines:
        say(line)
