"""What a decode step takes under several policies, over the same prompt, step by step in turn.

    python benchmarks/decode_steps.py --model llama-100m --context 16384 --policy full --policy quest --policy rocketkv

A policy is given as to fastkv-eval: with settings, and with kv_dtype or share_layers among them. The prompt is random
tokens; every policy reads it once, and then all make a few steps each, one after the other, so that a slow moment of
the machine falls on all. Prints medians of the rounds with their range; --json writes every single figure.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.files import check_replaceable, write_whole
from fastkv.console.load import load_model
from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_integer

if TYPE_CHECKING:
    from fastkv import LLM
    from fastkv.cache.kv_cache import KVCache
    from fastkv.eval.policy_spec import PolicySpec

HEAD = "| policy | a step, ms | x the first | entries, MiB |\n| --- | --- | --- | --- |"


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="decode_steps.py", description="What a decode step takes under several policies.")
    made.add_argument("--model", default="llama-100m", help="a preset (random weights) or a model folder")
    made.add_argument(
        "--context", type=int, nargs="+", default=[16384], metavar="N", help="tokens of the prompt (16384)"
    )
    made.add_argument(
        "--policy", action="append", metavar="P", help="repeatable; the first one is compared with (full)"
    )
    made.add_argument("--steps", type=int, default=4, metavar="N", help="of each policy in a round (4)")
    made.add_argument("--rounds", type=int, default=9, metavar="N", help="counted rounds (9); one comes before them")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--threads", type=int, default=None, metavar="N")
    made.add_argument("--device", default="auto", metavar="D")
    made.add_argument("--dtype", default="auto", metavar="T")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return made


def caches(llm: LLM, specs: Sequence[PolicySpec], context: int, room: int) -> list[KVCache]:
    """The prompt as each policy keeps it, with room for so many tokens."""
    import torch

    from fastkv.eval.policy_spec import stored_as

    ids = torch.randint(llm.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    made = []
    for spec in specs:
        with stored_as(llm, spec):
            made.append(llm.prefill(ids, spec.policy, room).cache)
    return made


def seconds_a_step(llm: LLM, cache: KVCache, steps: int) -> float:
    """The mean of so many steps, one after another."""
    import torch

    token = torch.tensor([1])
    began = time.perf_counter()
    for _ in range(steps):
        llm.decode(cache, token)
    if llm.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def rows_of(llm: LLM, specs: Sequence[PolicySpec], context: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    made = caches(llm, specs, context, (args.rounds + 1) * args.steps)
    times: list[list[float]] = [[] for _ in specs]
    for counted in range(-1, args.rounds):
        for mine, cache in zip(times, made, strict=True):
            seconds = seconds_a_step(llm, cache, args.steps)
            if counted >= 0:
                mine.append(seconds)
    return [
        {"context": context, "policy": spec.label, "seconds": mine, "cache_bytes": cache.nbytes}
        for spec, mine, cache in zip(specs, times, made, strict=True)
    ]


def told(row: dict[str, Any], first: dict[str, Any]) -> str:
    """A line of the table. Ratios are those of the same round."""
    ratios = [there / here for here, there in zip(row["seconds"], first["seconds"], strict=True)]
    milliseconds = [1e3 * each for each in row["seconds"]]
    cells = [
        f"{row['policy']}, {row['context']:,}",
        f"{statistics.median(milliseconds):.1f} ({min(milliseconds):.1f} to {max(milliseconds):.1f})",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{row['cache_bytes'] / 2**20:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def run(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    for name in ("steps", "rounds"):
        check_integer(f"--{name}", getattr(args, name), 1)
    for context in args.context:
        check_integer("--context", context, 1)
    if args.json is not None:
        check_replaceable(args.json, "json")

    from machine import machine

    from fastkv.eval.policy_spec import parse_policies
    from fastkv.models.presets import PRESETS

    settings = {"compile": args.compile, "load_format": "dummy" if args.model in PRESETS else "auto"}
    llm = load_model(args.model, args.threads, device=args.device, dtype=args.dtype, **settings)
    longest = max(args.context) + (args.rounds + 1) * args.steps
    if longest > llm.config.context_length:
        raise FastKVError(
            f"--context {max(args.context)} and the steps are more than the model's context of "
            f"{llm.config.context_length}; take a shorter one"
        )
    specs = parse_policies(args.policy or ["full"], llm.config.n_layers)
    about = {**machine(llm), "command": shlex.join(["python", "benchmarks/decode_steps.py", *argv]), "rows": []}
    print(f"{about['device']}, {about['date']}, {about['dtype']}\n\n{HEAD}")
    for context in args.context:
        rows = rows_of(llm, specs, context, args)
        print("\n".join(told(row, rows[0]) for row in rows), flush=True)
        about["rows"] += rows
        if args.json is not None:
            write_whole(args.json, json.dumps(about, indent=1) + "\n", "json")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return guarded("decode_steps.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
