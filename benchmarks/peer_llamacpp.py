"""This engine beside llama.cpp: the same weights, the same token ids, the same CPU and number of threads, in turns.

    pip install xllamacpp gguf
    python benchmarks/peer_llamacpp.py --model FOLDER --context 128 4096 --new-tokens 64 --rounds 3

llama.cpp gets the weights in F32 and in Q8_0, from GGUF files that are made of the model's folder once. Both engines
first continue a short text, to show that it is the same model; then every round has fresh random token ids. Prints
medians with the range, and ratios between equals: float32 to F32, int8 to Q8_0. --json writes every single figure, anew
after each context.

Measure on a machine that does nothing else: where another program takes one of its CPUs, llama.cpp can be many times
slower. The last line says how much others did. The wheels of xllamacpp for Linux use no more than AVX2; `pip install
--no-binary xllamacpp xllamacpp` builds it for the CPU at hand; the head of the table says which instructions are used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.files import check_folder, check_replaceable, write_whole
from fastkv.console.load import load_model
from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, FaultError, check_integer
from fastkv.storage import cache_folder, check_cache_folder

if TYPE_CHECKING:
    from llamacpp import LlamaCpp
    from runners import Runner, Sample

    from fastkv import LLM
    from fastkv.models.config import ModelConfig

EQUALS = {"float32": "F32", "int8": "Q8_0"}  # our weights -> those of llama.cpp that they are compared with
POLICIES = ("full", "fastkv")
PEER = "llama.cpp"
TEXT = "The capital of France is"
TEXT_TOKENS = 16
COLUMNS = (
    "context",
    "engine",
    "weights",
    "first token, s",
    "× llama.cpp",
    "decode, tokens/s",
    "× llama.cpp",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="peer_llamacpp.py", description="This engine beside llama.cpp, on the CPU.")
    made.add_argument("--model", required=True, help="a model folder or a hub id")
    made.add_argument("--context", type=int, nargs="+", default=[128, 4096], metavar="N", help="prompts (128 4096)")
    made.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens to generate, at least 2 (64)")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="counted runs of each, after a warm-up (3)")
    made.add_argument(
        "--weights", nargs="+", choices=list(EQUALS), default=["float32"], help="of this engine (float32)"
    )
    made.add_argument("--compile", action="store_true", help="measure this engine through torch.compile, too")
    made.add_argument("--threads", type=int, metavar="N", help="of both engines (default: torch's choice)")
    made.add_argument("--ubatch", type=int, default=512, metavar="N", help="prompt tokens in llama.cpp's batches (512)")
    made.add_argument("--gguf-folder", type=Path, metavar="FOLDER", help="of the GGUF files (the user's cache folder)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return made


def check(args: argparse.Namespace) -> None:
    """FastKVError for what can be known to be wrong before torch is there."""
    for context in args.context:
        check_integer("--context", context, 1)
    check_integer("--new-tokens", args.new_tokens, 2)
    check_integer("--rounds", args.rounds, 1)
    check_integer("--ubatch", args.ubatch, 1)
    if args.threads is not None:
        check_integer("--threads", args.threads, 1, 4096)
    if args.gguf_folder is None:
        check_cache_folder()
    else:
        check_folder(args.gguf_folder, "gguf_folder")
    if args.json is not None:
        check_replaceable(args.json, "json")
    for package in ("xllamacpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise FastKVError(f"this needs {package}: pip install xllamacpp gguf")


def check_model(args: argparse.Namespace, config: ModelConfig) -> None:
    """FastKVError for a model, and for weights, that cannot be measured."""
    from gguf_file import check_convertible

    check_convertible(config)
    if max(args.context) + args.new_tokens > config.context_length:
        raise FastKVError(
            f"--context {max(args.context)} with --new-tokens {args.new_tokens} is more than the model's context of "
            f"{config.context_length}; take a shorter one"
        )


def load(args: argparse.Namespace, folder: Path) -> dict[tuple[str, str], LLM]:
    """The model by (how it runs, its weights): plain, and compiled where that is asked for, with each of --weights."""
    chosen = {"float32": None, "int8": "int8"}
    ways = {"": False} | ({" compiled": True} if args.compile else {})
    return {
        (name, weights): load_model(
            folder, args.threads, dtype="float32", device="cpu", compile=way, weights=chosen[weights]
        )
        for name, way in ways.items()
        for weights in args.weights
    }


def same_tokens(llm: LLM, peer: LlamaCpp) -> int:
    """How many of the first TEXT_TOKENS greedy tokens agree. Raises FaultError where not even the first one does."""
    from fastkv import FullKV, SamplingParams

    assert llm.tokenizer is not None  # a GGUF file is not made without one
    ids = llm.tokenizer.encode(TEXT)
    ours = llm.generate(ids, SamplingParams(max_tokens=TEXT_TOKENS, ignore_eos=True), FullKV()).token_ids
    agreeing = leading_agreement(ours, peer.tokens(ids, TEXT_TOKENS))
    if not agreeing:
        raise FaultError(f"after {TEXT!r} llama.cpp goes on with another token: it is not the same model there")
    return agreeing


def leading_agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two have in common before they part."""
    parted = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parted, min(len(one), len(other)))


def peer_runner(peer: LlamaCpp) -> Runner:
    """llama.cpp by its own clock, which counts neither the way of a request to it nor that of its answer."""
    from runners import Sample

    def run(ids: Any, new_tokens: int) -> Sample:
        times = peer.complete(ids[0].tolist(), new_tokens)
        first, others = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        return Sample(first, (new_tokens - 1) / others, first + others)

    return run


def rows_of(
    args: argparse.Namespace, llms: dict[tuple[str, str], LLM], files: dict[str, Path]
) -> Iterator[list[dict[str, Any]]]:
    """Measure: the rows of one context after the other. llama.cpp has a KV cache of just that length."""
    from llamacpp import LlamaCpp
    from other_load import OtherLoad
    from runners import engine, measure, random_prompts

    from fastkv.cache.catalogue import POLICIES as KNOWN

    some = next(iter(llms.values()))
    for context in args.context:
        others = OtherLoad()
        with ExitStack() as stack:
            runs: dict[str, Runner] = {}
            for kind, path in files.items():
                peer = LlamaCpp(path, args.threads, context + args.new_tokens, args.ubatch)
                runs[f"{PEER} {kind}"] = peer_runner(stack.enter_context(peer))
            for (way, weights), llm in llms.items():
                runs |= {f"{policy}{way} {weights}": engine(llm, KNOWN[policy]()) for policy in POLICIES}
            prompts = random_prompts(some.config.vocab_size, context, 1)
            samples = measure(runs, prompts, args.new_tokens, args.rounds, warm_ups=1)
        yield [row | {"other_cpus": others.cpus()} for row in summarise(samples, context)]


def summarise(samples: dict[str, list[Sample]], context: int) -> list[dict[str, Any]]:
    """A row for each: medians, range, and how many times as fast as llama.cpp with the weights of the same kind."""
    from table import figures

    rows = []
    for name, taken in samples.items():
        engine, weights = name.rsplit(" ", 1)
        rows.append({"context": context, "engine": engine, "weights": weights, **figures(taken)})
    peers = {row["weights"]: row for row in rows if row["engine"] == PEER}
    for row in rows:
        if row["engine"] != PEER:
            peer = peers[EQUALS[row["weights"]]]
            row["prefill_to_peer"] = peer["ttft_s"] / row["ttft_s"]
            row["decode_to_peer"] = row["decode_tokens_per_s"] / peer["decode_tokens_per_s"]
    return rows


def table_row(row: dict[str, Any]) -> str:
    """A row as a line of the table; a dash where llama.cpp would be compared with itself."""

    def ratio(key: str) -> str:
        return f"{row[key]:.2f}" if key in row else "–"

    def median(key: str, span: str, digits: int) -> str:
        low, high = row[span]
        return f"{row[key]:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"

    cells = (
        f"{row['context']:,}",
        PEER if row["engine"] == PEER else f"fastkv, {row['engine']}",
        row["weights"],
        median("ttft_s", "ttft_range", 3),
        ratio("prefill_to_peer"),
        median("decode_tokens_per_s", "decode_range", 1),
        ratio("decode_to_peer"),
    )
    return f"| {' | '.join(cells)} |"


def foot(rows: Sequence[dict[str, Any]]) -> str:
    """What else the machine did, for each context."""
    loads = {f"{row['context']:,}": row["other_cpus"] for row in rows}
    told = ", ".join(f"{'unknown' if cpus is None else f'{cpus:.2f}'} at {context}" for context, cpus in loads.items())
    return f"- CPUs that other programs used meanwhile, in the mean: {told}"


def head(about: dict[str, Any]) -> str:
    """What the rows belong to and what their columns mean, as a list above the table."""
    peer = about["peer"]
    lines = (
        ("model", f"{about['model']}, activations float32"),
        ("device", f"{about['device']}; torch {about['torch']}, Python {about['python']}, fastkv {about['fastkv']}"),
        (
            "llama.cpp",
            f"of xllamacpp {peer['version']}, as many threads; batches of {peer['ubatch']}, memory-mapped, flash "
            f"attention auto, KV cache F16, nothing kept from one prompt to the next",
        ),
        ("instructions", f"torch {about['instructions']}; llama.cpp {' '.join(peer['instructions'])}"),
        ("date", about["date"]),
        ("same model", f"{about['same_tokens']} of {TEXT_TOKENS} greedy tokens agree, float32 and F32"),
        (
            "runs",
            f"{about['rounds']} of each, in turn, after one that is not counted; medians (lowest – highest); fresh "
            f"random token ids, the same for all; {about['new_tokens']} new tokens",
        ),
        ("× llama.cpp", "how many times as fast as llama.cpp: float32 as its F32, int8 as its Q8_0, same run"),
    )
    return "\n".join(f"- {label}: {text}" for label, text in lines)


def run(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    check(args)

    import torch
    from gguf_file import KINDS, gguf_file
    from llamacpp import LlamaCpp
    from machine import machine

    from fastkv.models.config import ModelConfig
    from fastkv.models.hub import model_folder

    folder = model_folder(args.model)
    check_model(args, ModelConfig.from_pretrained(folder))
    into = cache_folder() / "gguf" if args.gguf_folder is None else args.gguf_folder
    files = {kind: gguf_file(folder, kind, into) for kind in KINDS}
    llms = load(args, folder)
    args.threads = torch.get_num_threads()
    first = next(iter(llms.values()))
    with LlamaCpp(files["F32"], args.threads, 512) as peer:
        agreeing, about_peer = same_tokens(first, peer), peer.about
    result = {
        **machine(first),
        "command": shlex.join(["python", "benchmarks/peer_llamacpp.py", *argv]),
        "model": args.model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "peer": {**about_peer, "ubatch": args.ubatch},
        "same_tokens": agreeing,
        "threads": args.threads,
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
        "rows": [],
    }
    print(f"{head(result)}\n\n{HEADER}", flush=True)
    for rows in rows_of(args, llms, files):
        result["rows"] += rows
        print("\n".join(map(table_row, rows)), flush=True)
        if args.json is not None:
            write_whole(args.json, json.dumps(result, indent=1) + "\n", "json")
    print(f"\n{foot(result['rows'])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    return guarded("peer_llamacpp.py", lambda: run(sys.argv[1:] if argv is None else argv), ("json", "gguf_folder"))


if __name__ == "__main__":
    sys.exit(main())
