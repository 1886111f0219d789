"""The tables of docs/speed.md, in Markdown, from a result of gpu_suite.py.

python benchmarks/gpu_table.py benchmarks/results/2026-11-27-gpu-h200.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastkv.console.parser import Parser, guarded

GIB = 2**30


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Decoding, first tokens, and the peer: lines of Markdown."""
    done = {(each["step"], each["case"]): each for each in result["figures"] if each["status"] == "done"}
    yield "| context × batch | full, tokens/s | fastkv, tokens/s | × full | of copy bandwidth: full, fastkv |"
    yield "|---|---|---|---|---|"
    for (step, case), full in done.items():
        fast = done.get((step, case.replace("full", "fastkv", 1)))
        if step == "decode" and case.startswith("full") and fast is not None:
            speeds = full["tokens_per_s"], fast["tokens_per_s"]
            yield (
                f"| {full['context']:,} × {full['batch']} | {speeds[0]:.1f} | {speeds[1]:.1f} | "
                f"{speeds[1] / speeds[0]:.2f} | {100 * full['of_copy']:.0f} %, {100 * fast['of_copy']:.0f} % |"
            )
    yield ""
    yield "| prompt | full, s | fastkv, s | × full | peak: full, fastkv, GiB |"
    yield "|---|---|---|---|---|"
    for (step, case), full in sorted(done.items(), key=lambda each: each[1].get("context", 0)):
        fast = done.get((step, case.replace("full", "fastkv", 1)))
        if step.startswith("first") and case.startswith("full") and case.endswith("auto") and fast is not None:
            seconds, peaks = (full["ttft_s"], fast["ttft_s"]), (full["peak_bytes"] / GIB, fast["peak_bytes"] / GIB)
            yield (
                f"| {full['context']:,} | {seconds[0]:.3f} | {seconds[1]:.3f} | {seconds[0] / seconds[1]:.2f} | "
                f"{peaks[0]:.1f}, {peaks[1]:.1f} |"
            )
    yield ""
    yield "| 8,192 tokens and 33 new ones | first token, s | decode, tokens/s | in all, s |"
    yield "|---|---|---|---|"
    for (step, case), each in done.items():
        if step == "peer":
            name, speed = case.split()[0], each["decode_tokens_per_s"]
            yield f"| {name} | {each['ttft_s']:.3f} | {speed:.1f} | {each['total_s']:.2f} |"


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="gpu_table.py", description="Markdown tables of a result of gpu_suite.py.")
    parser.add_argument("result", type=Path, help="JSON that gpu_suite.py has written")
    print("\n".join(tables(json.loads(parser.parse_args(argv).result.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    sys.exit(guarded("gpu_table.py", lambda: run(sys.argv[1:])))
