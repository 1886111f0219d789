"""Time to first token, decoding speed and memory, for each policy and context length.

    python benchmarks/latency.py --model llama-100m --context 4096 8192 --dtype bfloat16 --peer transformers

Every run uses fresh random token ids; one warm-up round, then the policies (and the peer) in turn, so that a slow
moment of the machine falls on all of them. Prints medians with the range; --json writes every single figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cost import Ceilings, decode_bytes, measure_ceilings, prefill_flops

import fastkv
from fastkv import LLM, FastKVError, SamplingParams
from fastkv.cache.policies import POLICIES
from fastkv.cache.policy import Policy, plan_layers


@dataclass(frozen=True)
class Sample:
    """One request: seconds to the first token, tokens/s after it, and bytes (None for what is not measured)."""

    ttft_s: float
    decode_tokens_per_s: float
    kv_bytes: int | None = None
    peak_bytes: int | None = None


Contestant = Callable[[list[int], int], Sample]


def ours(llm: LLM, policy: Policy) -> Contestant:
    """A policy of this engine."""

    def run(ids: list[int], new_tokens: int) -> Sample:
        metrics = llm.generate(ids, SamplingParams(max_tokens=new_tokens, ignore_eos=True), policy).metrics
        assert metrics.decode_tokens_per_s is not None
        return Sample(metrics.ttft_s, metrics.decode_tokens_per_s, metrics.kv_bytes, metrics.peak_bytes)

    return run


def contestants(llm: LLM, policies: Sequence[str], peer: str | None) -> dict[str, Contestant]:
    found = {name: ours(llm, POLICIES[name]()) for name in policies}
    if peer == "transformers":
        from peer import transformers_peer

        run = transformers_peer(llm)
        found["transformers"] = lambda ids, new_tokens: Sample(*run(ids, new_tokens))
    return found


def measure(
    runs: dict[str, Contestant], llm: LLM, context: int, new_tokens: int, rounds: int
) -> dict[str, list[Sample]]:
    """`rounds` samples of each contestant, taken in turn behind one round that is not counted."""
    generator = torch.Generator().manual_seed(context)
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for counted in range(-1, rounds):
        ids = torch.randint(llm.config.vocab_size, (context,), generator=generator).tolist()
        for name, run in runs.items():
            sample = run(ids, new_tokens)
            if counted >= 0:
                samples[name].append(sample)
    return samples


def summarise(
    samples: dict[str, list[Sample]], llm: LLM, ceilings: Ceilings, context: int, new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each contestant: medians, range, ratios to the full cache, and shares of the ceilings."""
    rows = []
    for name, taken in samples.items():
        ttft = [sample.ttft_s for sample in taken]
        speed = [sample.decode_tokens_per_s for sample in taken]
        row: dict[str, Any] = {
            "context": context,
            "name": name,
            "ttft_s": statistics.median(ttft),
            "ttft_range": [min(ttft), max(ttft)],
            "decode_tokens_per_s": statistics.median(speed),
            "decode_range": [min(speed), max(speed)],
            "kv_bytes": taken[0].kv_bytes,
            "peak_bytes": taken[-1].peak_bytes,
        }
        if name in POLICIES:
            plans = plan_layers(POLICIES[name](), llm.config.n_layers, context)
            read = decode_bytes(llm.config, plans, new_tokens / 2, llm.dtype.itemsize)
            row["prefill_of_ceiling"] = prefill_flops(llm.config, plans) / row["ttft_s"] / ceilings.flops
            row["decode_of_ceiling"] = read * row["decode_tokens_per_s"] / ceilings.bandwidth
        rows.append(row)
    full = next((row for row in rows if row["name"] == "full"), None)
    for row in rows:
        if full is not None:
            row["prefill_to_full"] = full["ttft_s"] / row["ttft_s"]
            row["decode_to_full"] = row["decode_tokens_per_s"] / full["decode_tokens_per_s"]
    return rows


COLUMNS = (
    "context",
    "",
    "first token, s",
    "× full",
    "of FLOP ceiling",
    "decode, tokens/s",
    "× full",
    "of bandwidth",
    "KV, MiB",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def table_row(row: dict[str, Any]) -> str:
    def share(key: str) -> str:
        return f"{100 * row[key]:.0f} %" if key in row else "–"

    def ratio(key: str) -> str:
        return f"{row[key]:.2f}" if key in row else "–"

    kv = "–" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 2**20:,.1f}"
    low, high = row["ttft_range"]
    slow, fast = row["decode_range"]
    cells = (
        f"{row['context']:,}",
        row["name"],
        f"{row['ttft_s']:.3f} ({low:.3f} – {high:.3f})",
        ratio("prefill_to_full"),
        share("prefill_of_ceiling"),
        f"{row['decode_tokens_per_s']:.1f} ({slow:.1f} – {fast:.1f})",
        ratio("decode_to_full"),
        share("decode_of_ceiling"),
        kv,
    )
    return f"| {' | '.join(cells)} |"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Time to first token, decoding speed and memory of each policy.")
    made.add_argument("--model", default="llama-100m", help="a preset (random weights) or a model folder")
    made.add_argument("--context", type=int, nargs="+", default=[4096], metavar="N", help="prompt lengths in tokens")
    made.add_argument("--policy", nargs="+", default=["full", "fastkv"], choices=list(POLICIES), help="to compare")
    made.add_argument("--new-tokens", type=int, default=33, metavar="N", help="tokens to generate (33)")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="counted runs of each (3)")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--device", default="auto")
    made.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    made.add_argument("--peer", choices=["transformers"], help="time Hugging Face's model on the same weights too")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return made


def machine(llm: LLM) -> dict[str, Any]:
    """What the figures belong to."""
    name = _cpu_name() + f", {torch.get_num_threads()} threads"
    if llm.device.type == "cuda":
        name = torch.cuda.get_device_name(llm.device)
    return {
        "date": date.today().isoformat(),
        "device": name,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "fastkv": fastkv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        llm = LLM(args.model, dtype=args.dtype, device=args.device, load_format="dummy")
    except FastKVError as error:
        print(f"latency.py: error: {error}", file=sys.stderr)
        return 2
    about = machine(llm)
    ceilings = measure_ceilings(llm.device, llm.dtype)
    print(
        f"{args.model}, random weights, {about['dtype']}, on {about['device']}; torch {about['torch']}, "
        f"{about['date']}; ceilings {ceilings.flops / 1e9:,.0f} GFLOP/s, {ceilings.bandwidth / 1e9:,.1f} GB/s; "
        f"{args.rounds} runs each, medians (range)\n\n{HEADER}"
    )
    rows = []
    for context in args.context:
        samples = measure(contestants(llm, args.policy, args.peer), llm, context, args.new_tokens, args.rounds)
        for row in summarise(samples, llm, ceilings, context, args.new_tokens):
            row["samples"] = [asdict(sample) for sample in samples[row["name"]]]
            rows.append(row)
            print(table_row(row), flush=True)
    if args.json is not None:
        command = " ".join(["python", "benchmarks/latency.py", *(sys.argv[1:] if argv is None else argv)])
        result = {**about, "command": command, "model": args.model, "ceilings": asdict(ceilings), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
