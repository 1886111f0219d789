"""fastkv-eval turns: what becomes of the second, third and fifth question about a text that was compressed once."""

from __future__ import annotations

import argparse

from fastkv.errors import FastKVError, writable
from fastkv.eval.policy_spec import parse_policies
from fastkv.eval.results import Results
from fastkv.eval.run import (
    DEFAULT_EXAMPLES,
    DEFAULT_LENGTHS,
    DEFAULT_POLICIES,
    collect,
    conclude,
    described,
    load,
    surroundings,
)
from fastkv.eval.turns.families import FAMILIES
from fastkv.eval.turns.runner import TURNS, Plan, TurnsRunner
from fastkv.eval.turns.table import render

DEFAULT_QUESTIONS = 5
_OF_A_TURN = 256  # tokens that a question with its answer takes at most, where lengths are chosen here


def run(args: argparse.Namespace) -> int:
    """Run the command and print its tables, also of a run that is interrupted; its exit status."""
    texts = args.policy or DEFAULT_POLICIES
    labels = [spec.label for spec in parse_policies(texts, kv_dtype=args.kv_dtype)]  # before the model is loaded
    llm, folder = load(args)
    plan = plan_of(args, llm.config.context_length)
    specs = parse_policies(texts, llm.config.n_layers, args.kv_dtype)
    runner = TurnsRunner(llm, plan, specs)
    header = {
        "model": writable(args.model),
        "revision": args.revision,
        **surroundings(llm, folder),
        "turns": plan.mode,  # no other command's file has it
        "questions": plan.questions,
        "tasks": [family.name for family in plan.families],
        "lengths": plan.lengths,
        "examples": plan.examples,
        "seed": plan.seed,
        "max_tokens": plan.max_tokens,
        "policies": described(llm, specs),
    }
    results, total = Results(header, args.output), len(plan.slots()) * len(specs) * plan.questions
    collect(args, runner, results, total)
    tables = render(results.records, labels, plan.questions, plan.mode)
    return conclude(args, tables, total - len(results.records))


def plan_of(args: argparse.Namespace, context: int) -> Plan:
    """The texts that the flags ask for; lengths that are not given are those that fit the context."""
    questions = args.questions or DEFAULT_QUESTIONS
    lengths = args.length or [length for length in DEFAULT_LENGTHS if length + questions * _OF_A_TURN <= context]
    if not lengths:
        raise FastKVError(f"the model's context is {context} tokens; say which lengths fit it", setting="length")
    return Plan(
        families=tuple(FAMILIES[name] for name in dict.fromkeys(args.task)),
        lengths=tuple(sorted(set(lengths))),
        examples=args.examples or DEFAULT_EXAMPLES,
        questions=questions,
        mode=args.mode or TURNS,
        seed=args.seed or 0,
        max_tokens=args.max_tokens,
    )
