"""Seconds that many questions about one document take in all: each as a prompt of its own, and asked of a session.

    python benchmarks/many_questions.py --model examples/archive/model --device cpu --dtype float32

A prompt of its own is document and question together, read anew each time. A session reads the document once and then
each question alone: one after another, or all of them together. Each round takes fresh random tokens, and the ways are
measured in turn, so that a slow moment of the machine falls on all of them; the first round does not count. Prints
medians with the range; --json writes every single figure.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.files import check_replaceable, write_whole
from fastkv.console.load import load_model
from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_choice, check_integer

if TYPE_CHECKING:
    from fastkv import LLM, Policy, SamplingParams

COUNTS = ("length", "questions", "question_tokens", "new_tokens", "rounds")


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="many_questions.py", description="Many questions about one document.")
    made.add_argument("--model", required=True, help="a model folder, or a preset (random weights)")
    made.add_argument("--length", type=int, default=3000, metavar="N", help="tokens of the document (3000)")
    made.add_argument("--questions", type=int, default=10, metavar="N", help="asked of it (10)")
    made.add_argument("--question-tokens", type=int, default=16, metavar="N", help="of each question (16)")
    made.add_argument("--new-tokens", type=int, default=8, metavar="N", help="of each answer (8)")
    made.add_argument("--rounds", type=int, default=5, metavar="N", help="that count (5)")
    made.add_argument("--policy", default=None, metavar="NAME", help="of prompts and session (default: the session's)")
    made.add_argument("--device", default="auto", metavar="D")
    made.add_argument("--dtype", default="auto", metavar="T")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return made


def ways(
    llm: LLM, policy: Policy, params: SamplingParams
) -> dict[str, Callable[[list[int], list[list[int]]], list[list[int]]]]:
    """What is compared: document and questions, as token ids -> the token ids of each answer."""

    def alone(document: list[int], questions: list[list[int]]) -> list[list[int]]:
        return [llm.generate([*document, *question], params, policy).token_ids for question in questions]

    def in_turn(document: list[int], questions: list[list[int]]) -> list[list[int]]:
        session = llm.session(policy)
        session.add(document)
        return [llm.generate(session.turn(question, keep=False), params).token_ids for question in questions]

    def together(document: list[int], questions: list[list[int]]) -> list[list[int]]:
        session = llm.session(policy)
        session.add(document)
        asked = [session.turn(question, keep=False) for question in questions]
        return [output.token_ids for output in llm.generate(asked, params)]

    return {"each a prompt of its own": alone, "a session, one by one": in_turn, "a session, together": together}


def measured(llm: LLM, policy: Policy, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way in each round that counts."""
    from runners import random_prompts

    from fastkv import SamplingParams

    compared = ways(llm, policy, SamplingParams(max_tokens=args.new_tokens, ignore_eos=True))
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    documents = random_prompts(llm.config.vocab_size, args.length, 1)
    asked = random_prompts(llm.config.vocab_size, args.question_tokens, args.questions)
    for _ in range(args.rounds + 1):
        (document,), questions = next(documents).tolist(), next(asked).tolist()
        for name, way in compared.items():
            started = time.perf_counter()
            way(document, questions)
            seconds[name].append(time.perf_counter() - started)
    return {name: each[1:] for name, each in seconds.items()}


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown; how many times as fast as prompts of their own."""
    first = statistics.median(next(iter(seconds.values())))
    lines = ["| | seconds in all | times as fast |", "|---|---|---|"]
    for name, each in seconds.items():
        median = statistics.median(each)
        lines.append(f"| {name} | {median:.2f} ({min(each):.2f} – {max(each):.2f}) | {first / median:.1f} |")
    return "\n".join(lines)


def run(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    for name in COUNTS:
        check_integer(name, getattr(args, name), 1)
    if args.json is not None:
        check_replaceable(args.json, "json")

    from machine import machine

    from fastkv.cache.catalogue import POLICIES
    from fastkv.engine.session import DEFAULT_POLICY
    from fastkv.models.presets import PRESETS

    if args.policy is not None:
        check_choice("policy", args.policy, POLICIES)
    policy = DEFAULT_POLICY if args.policy is None else POLICIES[args.policy]()
    load_format = "dummy" if args.model in PRESETS else "auto"
    llm = load_model(args.model, device=args.device, dtype=args.dtype, load_format=load_format)
    longest = args.length + args.question_tokens + args.new_tokens
    if longest > llm.config.context_length:
        raise FastKVError(
            f"length must leave room in the model's context of {llm.config.context_length}, not {longest}"
        )
    about: dict[str, Any] = {**machine(llm), "command": shlex.join(["python", "benchmarks/many_questions.py", *argv])}
    about |= {"model": args.model, "policy": policy.name, **{name: getattr(args, name) for name in COUNTS}}
    print(
        f"{about['device']}, {about['date']}, {about['dtype']}, policy {policy.name}: {args.questions} questions of "
        f"{args.question_tokens} tokens on a document of {args.length:,}, {args.new_tokens} new tokens each\n"
    )
    seconds = measured(llm, policy, args)
    print(table(seconds))
    if args.json is not None:
        write_whole(args.json, json.dumps({**about, "seconds": seconds}, indent=1) + "\n", "json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded(
        "many_questions.py", lambda: run(sys.argv[1:] if argv is None else argv), {*COUNTS, "policy", "json"}
    )


if __name__ == "__main__":
    sys.exit(main())
