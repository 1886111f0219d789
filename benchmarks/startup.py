"""How long a process of fastkv-run takes: to its first output, and in all; with and without --compile, in turn.

    python benchmarks/startup.py --model FOLDER --prompt prompt.txt --rounds 5

On a CPU, in float32, with a full cache and 64 new tokens. Prints medians with the range. The first run of each, which
may compile and measure, is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_integer

KINDS = ((), ("--compile",), ("--weights", "int8"), ("--weights", "int8", "--compile"))
SETTINGS = ("--device", "cpu", "--dtype", "float32", "--policy", "full", "--max-tokens", "64", "--quiet")


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Seconds from the start of a process to its first output, and to its end."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - began
        _, errors = process.communicate()
    if process.returncode:
        raise FastKVError(f"fastkv-run failed: {errors.decode(errors='replace').strip()}")
    return first, time.perf_counter() - began


def told(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} – {max(seconds):.1f})"


def run(argv: Sequence[str]) -> None:
    made = Parser(prog="startup.py", description="How long a process of fastkv-run takes.")
    made.add_argument("--model", required=True, help="a model folder or a hub id")
    made.add_argument("--prompt", required=True, help="a file of text")
    made.add_argument("--rounds", type=int, default=5, help="processes of each kind that count (5)")
    args = made.parse_args(argv)
    check_integer("rounds", args.rounds, 1)
    command = [sys.executable, "-m", "fastkv", "--model", args.model, "--prompt", args.prompt, *SETTINGS]
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds + 1):
        for kind, times in found.items():
            times.append(timed([*command, *kind]))
    print("| flags | first output, s | all, s |\n|---|---|---|")
    for kind, times in found.items():
        firsts, wholes = zip(*times[1:], strict=True)
        print(f"| `{' '.join(kind) or '(none)'}` | {told(firsts)} | {told(wholes)} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("startup.py", lambda: run(sys.argv[1:] if argv is None else argv), {"rounds"})


if __name__ == "__main__":
    sys.exit(main())
