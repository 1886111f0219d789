"""Everything that only a GPU can tell, in one short run: tests, ceilings, decoding, first tokens, profiles, the peer.

    python3 benchmarks/gpu_suite.py --out FOLDER --deadline 400
    python3 benchmarks/gpu_suite.py --out FOLDER --steps million       a prompt of 1,000,000 tokens
    python3 benchmarks/gpu_suite.py --out FOLDER --steps variants      8K without graphs, and with other attention
    python3 benchmarks/gpu_suite.py --out FOLDER --steps tests model tsp-layer padding scores compiled compiled-apart
        ways of the engine beside those that they replace; compiled-tuned lets the compiler try for longer

Needs python3 with torch (2.11 or later), safetensors, tokenizers, huggingface-hub and pytest; no network, and nothing
is installed: the package is found through a link to this checkout, into which nothing is written. What does not fit
before the deadline is skipped, and what fails does not end the run. FOLDER gets DATE-gpu-suite.json and .txt, written
anew after every figure, and the output of the tests.

A small run anywhere: --model llama-100m --device cpu --scale 0.01
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite_case import Case, Suite

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    from fastkv.console.parser import Parser

    made = Parser(prog="gpu_suite.py", description="Everything that only a GPU can tell.")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the results")
    made.add_argument("--deadline", type=float, default=400, metavar="S", help="seconds for all of it (400)")
    made.add_argument("--steps", nargs="+", metavar="NAME", help="only these")
    made.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="all but these")
    made.add_argument("--model", default="llama-3.1-8b", help="a preset or a folder's config.json, random weights")
    made.add_argument("--scale", type=float, default=1.0, metavar="X", help="shorten every context by this factor (1)")
    made.add_argument("--dtype", default="auto", metavar="T")
    made.add_argument("--device", default="auto", metavar="D")
    return made


@contextmanager
def linked() -> Iterator[None]:
    """Let this process and those that it starts find the package in this checkout, and write nothing there."""
    path, writes, environment = list(sys.path), sys.dont_write_bytecode, dict(os.environ)
    with tempfile.TemporaryDirectory() as links:
        (Path(links) / "fastkv").symlink_to(ROOT)
        sys.path.insert(0, links)
        sys.dont_write_bytecode = True
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [links, os.environ.get("PYTHONPATH")]))
        os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1")
        try:
            yield
        finally:
            sys.path[:], sys.dont_write_bytecode = path, writes
            os.environ.clear()
            os.environ.update(environment)


def run(argv: Sequence[str], started: float) -> None:
    args = parser().parse_args(argv)

    from suite_case import Suite
    from suite_record import Record, Warnings
    from suite_steps import ONLY_BY_NAME, STEPS

    from fastkv.engine.device import resolve_device
    from fastkv.errors import check_choice

    for name in [*(args.steps or []), *args.skip]:
        check_choice("a step", name, STEPS)
    wanted = args.steps or [name for name in STEPS if name not in ONLY_BY_NAME]
    device = resolve_device(args.device)
    about = about_run(args, argv, device)
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out, f"{about['date']}-gpu-suite", about)
    suite = Suite(args, device, record, started + args.deadline)
    handler = Warnings(record)
    logging.getLogger("fastkv").addHandler(handler)
    try:
        for name in wanted:
            for case in STEPS[name](suite) if name not in args.skip else ():
                measure(suite, name, case)
    finally:
        logging.getLogger("fastkv").removeHandler(handler)
    record.say(f"done after {time.monotonic() - started:.0f} s")


def about_run(args: argparse.Namespace, argv: Sequence[str], device: Any) -> dict[str, Any]:
    """What every figure belongs to."""
    import torch
    from machine import device_and_versions

    about = {
        **device_and_versions(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "command": shlex.join(["python3", "benchmarks/gpu_suite.py", *hidden_folder(argv)]),
        "model": args.model,
        "weights": "random",
        "scale": args.scale,
        "decode": "on caches of random entries, no prefill; median time between tokens",
    }
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with suppress(subprocess.TimeoutExpired):
            about["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return about


def hidden_folder(argv: Sequence[str]) -> list[str]:
    """The arguments, without where this machine keeps its results."""
    return ["FOLDER" if before == "--out" else each for before, each in zip(["", *argv], argv, strict=False)]


def measure(suite: Suite, step: str, case: Case) -> None:
    """Run a case if it fits before the deadline; record what came of it, whatever that is."""
    estimate = case.seconds * suite.args.scale
    if estimate > suite.left:
        why = f"{estimate:.0f} s expected, {max(0.0, suite.left):.0f} s left"
        suite.record.add(step, case.name, "skipped", why=why)
        return
    started = time.perf_counter()
    status, values = outcome(case)
    gc.collect()  # what an exception held on to
    try:
        suite.clean()
    except RuntimeError as error:  # a device that is lost says so at every call
        values["afterwards"] = str(error).splitlines()[0]
    took = round(time.perf_counter() - started, 2)
    suite.record.add(step, case.name, status, **values, estimate_s=estimate, took_s=took)


def outcome(case: Case) -> tuple[str, dict[str, Any]]:
    """How a case ended, and its figures or the last lines of what went wrong."""
    import torch
    from suite_case import NotNeededError

    from fastkv.errors import FastKVError

    try:
        return "done", case.run()
    except NotNeededError as reason:
        return "skipped", {"why": str(reason)}
    except torch.OutOfMemoryError as error:
        return "does not fit", {"why": str(error).splitlines()[0]}
    except FastKVError as error:
        return "does not fit" if "memory" in str(error) else "failed", {"why": str(error)}
    except Exception as error:  # whatever it is, the other cases are worth their time
        lines = traceback.format_exc().splitlines()
        return "failed", {"why": f"{type(error).__name__}: {error}"[:600], "traceback": lines[-12:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 also where some cases failed, which the record says."""
    started = time.monotonic()
    with linked():
        from fastkv.console.parser import guarded

        return guarded("gpu_suite.py", lambda: run(sys.argv[1:] if argv is None else argv, started))


if __name__ == "__main__":
    sys.exit(main())
