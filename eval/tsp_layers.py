"""fastkv-eval tsp-layers: behind which layer, and at which rate, should this model drop tokens?

It measures on the user's own prompts, or on generated questions, how the importance of tokens settles with depth
(layer_importance.py), advises a TSP layer and rate by a rule that it prints (layer_advice.py), and has that advice
checked by running it (layer_check.py, layer_search.py). Heavy imports wait until the flags are good.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.parser import DONE, Parser, add_machine_flags
from fastkv.errors import FastKVError, check_choice, check_integer, check_number
from fastkv.eval.cli_flags import DEFAULT_DEPTHS, DEFAULT_EXAMPLES, DEFAULT_LENGTHS
from fastkv.eval.cli_tasks import load
from fastkv.eval.policy_spec import parse_policies
from fastkv.eval.tasks import NAMES, build_tasks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkv.cache.policies import FastKV
    from fastkv.engine.llm import LLM
    from fastkv.eval.layer_check import Exam, Show

RATES = [0.05, 0.1, 0.2, 0.3, 0.5]
COMPARED = 32  # greedy tokens of each prompt that has no answer
_TASKS_ONLY = ("length", "depth", "examples", "seed", "qa_file")


def build_parser() -> Parser:
    parser = Parser(
        prog="fastkv-eval tsp-layers",
        description="Advise a TSP layer and rate for a model, and check the advice by running it.",
    )
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model folder, or hub id like org/name")
    what = parser.add_argument_group("prompts: one of these two")
    what.add_argument("--prompt", action="append", metavar="FILE", help="a text of your own (repeatable)")
    what.add_argument("--task", nargs="+", metavar="NAME", help="generated questions, by the tasks of fastkv-eval")
    tasks = parser.add_argument_group("generated questions")
    tasks.add_argument("--length", type=int, nargs="+", metavar="N", help="tokens (default 1024 2048 4096, as fits)")
    tasks.add_argument("--depth", type=float, nargs="+", metavar="D", help="0 to 1 (0 0.25 0.5 0.75 1)")
    tasks.add_argument("--examples", type=int, metavar="N", help="of each task, length and depth (5)")
    tasks.add_argument("--seed", type=int, metavar="S", help="fixes every text (0)")
    tasks.add_argument("--qa-file", type=Path, metavar="FILE", help="questions of task qa")
    parser.add_argument("--policy", default="fastkv", metavar="P", help="fastkv:setting=value,… (default fastkv)")
    parser.add_argument("--tsp-rate", type=float, nargs="+", metavar="R", help="rates (0.05 0.1 0.2 0.3 0.5)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"of an answer (the task's own); compared of a --prompt ({COMPARED})",
    )
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw how importance settles (extra: eval)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    machine = parser.add_argument_group("machine")
    add_machine_flags(machine)
    machine.add_argument("--quiet", action="store_true", help="no progress line")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; its exit status. Raises FastKVError, as eval/cli.py expects, for a user's mistake."""
    args = build_parser().parse_args(argv)
    _check(args)
    tasks = build_tasks(args.task, args.qa_file) if args.task else []
    policy = _policy(args)

    from fastkv.eval.layer_advice import RULE, candidates, default_setting
    from fastkv.eval.layer_importance import mean, measure
    from fastkv.eval.layer_progress import Progress
    from fastkv.eval.layer_report import advice_line, report, write_json
    from fastkv.eval.layer_search import search
    from fastkv.eval.layer_table import check_table, importance_tables

    llm, _ = load(args)
    policy = _policy(args, llm.config.n_layers)
    if llm.config.n_layers < 2:
        raise FastKVError("the model has one layer: there is none behind it to save work in", setting="model")
    rates = tuple(sorted(set(args.tsp_rate or RATES)))
    with Progress(None if args.quiet else sys.stderr) as progress:
        prompts, exam = _prompts_and_exam(args, llm, tasks, policy, progress.show)
        parts = []
        for done, ids in enumerate(prompts):
            progress.show("measuring", done, len(prompts))
            parts.append(measure(llm, ids, policy, rates))
        progress.clear()
        importance, lengths = mean(parts), [len(ids) for ids in prompts]
        print(importance_tables(importance), flush=True)
        default = default_setting(policy, llm.config, lengths)
        found = search(exam, default, candidates(importance, policy, llm.config, lengths))
    print(RULE)
    print(check_table(found.full, found.checked))
    print(advice_line(found))
    if args.json is not None:
        write_json(args.json, report(vars(args), llm, lengths, importance, found))
    if args.plot is not None:
        from fastkv.eval.layer_plot import draw

        title = f"{Path(args.model).name}: {len(prompts)} prompts of {min(lengths):,} to {max(lengths):,} tokens"
        draw(importance, default, found.advice, title, args.plot)
    return DONE


def _check(args: argparse.Namespace) -> None:
    if (args.prompt is None) == (args.task is None):
        raise FastKVError("give either --prompt FILE or --task NAME: what to measure on")
    given = [f"--{name.replace('_', '-')}" for name in _TASKS_ONLY if getattr(args, name) is not None]
    if args.prompt and given:
        raise FastKVError(f"{given[0]} is for --task: leave it out with --prompt")
    for name in args.task or []:
        check_choice("task", name, NAMES)
    for length in args.length or []:
        check_integer("length", length, 1)
    for depth in args.depth or []:
        check_number("depth", depth, 0, 1)
    for name, high in (("examples", None), ("max_tokens", None), ("threads", 4096)):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1, high)
    for rate in args.tsp_rate or []:
        if not 0 < rate < 1:
            raise FastKVError(f"--tsp-rate {rate:g}: must be above 0 and below 1")
    if args.json is not None and not args.json.parent.is_dir():
        raise FastKVError(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.plot is not None:
        from fastkv.eval.layer_plot import check_plot

        check_plot(args.plot)


def _policy(args: argparse.Namespace, n_layers: int | None = None) -> FastKV:
    """What is to be advised on: its TSP layer and rate are the default that the advice must not fall behind."""
    from fastkv.cache.policies import FastKV
    from fastkv.eval.layer_advice import highest_void_rate

    policy = parse_policies([args.policy], n_layers)[0].policy
    if not isinstance(policy, FastKV):
        raise FastKVError(f"--policy {args.policy}: has no TSP layer; give fastkv, with settings or without")
    if isinstance(policy.tsp_layer, tuple) or isinstance(policy.tsp_rate, tuple):
        raise FastKVError(f"--policy {args.policy}: the advice is one TSP layer and one rate; leave the others out")
    if policy.tsp_len is not None:
        raise FastKVError(f"--policy {args.policy}: the advice is a rate; leave tsp_len out")
    if max(args.tsp_rate or RATES) <= highest_void_rate(policy):
        raise FastKVError(f"--policy {args.policy}: no rate is above its kv_retention; add a higher --tsp-rate")
    return policy


def _prompts_and_exam(
    args: argparse.Namespace, llm: LLM, tasks: Sequence[Any], policy: FastKV, show: Show
) -> tuple[list[list[int]], Exam]:
    """Token ids of every prompt, and the exam that they make. All is checked before anything runs."""
    from fastkv.eval.layer_check import Answers, Continuations
    from fastkv.eval.layer_importance import Recorder
    from fastkv.eval.layer_prompts import own_prompts, questions
    from fastkv.eval.runner import Plan

    drops = Recorder(policy)
    if args.prompt:
        compared = args.max_tokens or COMPARED
        prompts = own_prompts(llm, args.prompt, drops, compared, args.chat)
        return prompts, Continuations(llm, prompts, compared, show)
    answer = args.max_tokens or max(task.max_new_tokens for task in tasks)
    lengths = args.length or [length for length in DEFAULT_LENGTHS if length + answer <= llm.config.context_length]
    if not lengths:
        raise FastKVError(f"the context is {llm.config.context_length} tokens; say what fits it", setting="length")
    plan = Plan(
        tasks=tuple(tasks),
        lengths=tuple(sorted(set(lengths))),
        depths=tuple(sorted(set(args.depth or DEFAULT_DEPTHS))),
        examples=args.examples or DEFAULT_EXAMPLES,
        seed=args.seed or 0,
        max_tokens=args.max_tokens,
    )
    asked = questions(llm, plan, drops, args.chat)
    return [question.ids for question in asked], Answers(llm, asked, show)
