"""Time to first token, decoding speed, end-to-end time and memory, for each policy, context length and batch.

    python benchmarks/latency.py --model llama-100m --context 4096 8192 --dtype bfloat16 --peer transformers

Every run uses fresh random token ids; a warm-up round, then the policies (and the peer) in turn, so that a slow
moment of the machine falls on all of them. Prints medians with the range. --json writes every single figure, anew
after each context and batch: a run that is cut short leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot import draw

from fastkv.console.files import check_replaceable, write_whole
from fastkv.console.load import load_model
from fastkv.console.parser import Parser, check_installed, guarded
from fastkv.console.picture import check_picture
from fastkv.errors import FastKVError, check_choice, check_integer

if TYPE_CHECKING:
    from cost import Ceilings

    from fastkv import LLM


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="latency.py",
        description="Time to first token, decoding speed and memory of each policy.",
    )
    made.add_argument("--model", default="llama-100m", help="a preset (random weights), a model folder or a hub id")
    made.add_argument("--context", type=int, nargs="+", default=[4096], metavar="N", help="prompt lengths (4096)")
    made.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="prompts at a time, fewest first (1)"
    )
    made.add_argument(
        "--policy", nargs="+", default=["full", "fastkv"], metavar="NAME", help="to compare (full fastkv)"
    )
    made.add_argument("--new-tokens", type=int, default=33, metavar="N", help="tokens to generate, at least 2 (33)")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="counted runs of each (3)")
    made.add_argument("--warm-ups", type=int, default=1, metavar="N", help="runs before them that do not count (1)")
    made.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    made.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:N")
    made.add_argument("--no-cuda-graph", action="store_true", help="on a GPU, decode without captured graphs")
    made.add_argument("--compile", action="store_true", help="run the layers through torch.compile")
    made.add_argument("--attention", default="auto", metavar="B", help="auto (default), cudnn, flash, efficient, math")
    made.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    made.add_argument("--peer", choices=["transformers"], help="time Hugging Face's model on the same weights too")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows there (see plot.py)")
    return made


def check(args: argparse.Namespace) -> None:
    """FastKVError for what can be known to be wrong before torch is there."""
    for context in args.context:
        check_integer("--context", context, 1)
    for batch in args.batch:
        check_integer("--batch", batch, 1)
    check_integer("--new-tokens", args.new_tokens, 2)  # the speed of decoding is that after the first one
    check_integer("--rounds", args.rounds, 1)
    check_integer("--warm-ups", args.warm_ups, 0)
    if args.threads is not None:
        check_integer("--threads", args.threads, 1, 4096)
    if args.peer:
        check_installed("--peer", args.peer, "test")
    if args.plot is not None:
        check_picture(args.plot, "plot", "bench")
    if args.json is not None:
        check_replaceable(args.json, "json")


def load(args: argparse.Namespace) -> tuple[LLM, str]:
    """The model, and whether its weights are "random" or "stored".

    Random for the name of a preset and for a folder that holds no safetensors.
    """
    from fastkv.cache.catalogue import POLICIES
    from fastkv.models.presets import PRESETS

    for name in args.policy:
        check_choice("--policy", name, POLICIES)
    folder = Path(args.model).expanduser()
    dummy = args.model in PRESETS or (folder.is_dir() and not any(folder.glob("*.safetensors")))
    llm = load_model(
        args.model,
        args.threads,
        dtype=args.dtype,
        device=args.device,
        load_format="dummy" if dummy else "auto",
        cuda_graph=not args.no_cuda_graph,
        compile=args.compile,
        attention=args.attention,
    )
    longest = max(args.context) + args.new_tokens
    if longest > llm.config.context_length:
        raise FastKVError(
            f"--context {max(args.context)} with --new-tokens {args.new_tokens} is more than the model's context of "
            f"{llm.config.context_length}; take a shorter one"
        )
    return llm, "random" if dummy else "stored"


def rows_of(args: argparse.Namespace, llm: LLM, ceilings: Ceilings) -> Iterator[list[dict[str, Any]]]:
    """Measure: the rows of one context and batch after the other."""
    from runners import measure, random_prompts, runners, transformers
    from table import compare_with_one, summarise

    runs = runners(llm, args.policy, transformers(llm) if args.peer else None)
    for context in args.context:
        alone: list[dict[str, Any]] = []
        for batch in sorted(args.batch):
            prompts = random_prompts(llm.config.vocab_size, context, batch)
            samples = measure(runs, prompts, args.new_tokens, args.rounds, args.warm_ups, llm.free_buffers)
            rows = summarise(samples, llm, ceilings, context, batch, args.new_tokens)
            alone = rows if batch == 1 else alone
            compare_with_one(rows, alone)
            yield rows


def run(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    check(args)

    from cost import measure_ceilings
    from machine import machine
    from peer import check_peer
    from table import HEADER, head, table_row

    llm, weights = load(args)
    if args.peer:
        check_peer(llm.config)
    ceilings = measure_ceilings(llm.device, llm.dtype)
    result = {
        **machine(llm),
        "command": shlex.join(["python", "benchmarks/latency.py", *argv]),
        "model": args.model,
        "weights": weights,
        "policies": args.policy,
        "peer": args.peer,
        "rounds": args.rounds,
        "warm_ups": args.warm_ups,
        "new_tokens": args.new_tokens,
        "ceilings": asdict(ceilings),
        "rows": [],
    }
    print(f"{head(result)}\n\n{HEADER}", flush=True)
    for rows in rows_of(args, llm, ceilings):
        result["rows"] += rows
        print("\n".join(map(table_row, rows)), flush=True)
        if args.json is not None:
            write_whole(args.json, json.dumps(result, indent=1) + "\n", "json")
    if args.plot is not None:
        draw(result, args.plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    return guarded("latency.py", lambda: run(sys.argv[1:] if argv is None else argv), ("json", "plot"))


if __name__ == "__main__":
    sys.exit(main())
