"""Is the memory that a request needs what engine/footprint.py works out? Each case is a process of its own, on a CPU.

    python benchmarks/footprint.py --model FOLDER --tokens 512,1024,2048,4096 --policies fastkv,full,snapkv

A process loads the model, answers a short prompt, lets its buffers go, and then answers a prompt of so many random
tokens. What counts is its peak of resident memory less what was resident before, and that is measured twice. *exact*:
the C library gives every freed block back at once (MALLOC_MMAP_THRESHOLD_) and there is no tokenizer, so that what is
resident is what is alive. *as usual*: it keeps freed blocks for later; how much, depends on the order of their sizes.
For Linux with glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastkv.cache.catalogue import POLICIES
from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_choice

KEYS = ("model", "dtype", "weights", "policy", "tokens", "threads")
LOADING = "| loading | dtype | estimate | measured | ratio |"
SHORT, NEW = 32, 4  # tokens of the short prompt, and of every answer
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
HEADER = "| model | dtype | policy | tokens | KV cache | buffers | scratch | estimate | exact | ratio | as usual |"


def measured_load(case: dict[str, Any]) -> dict[str, Any]:
    """What loading takes, in bytes, by this process."""
    import torch

    from fastkv import LLM
    from fastkv.engine.loading import load_peak
    from fastkv.engine.memory import peak_bytes

    before = begin(trim=False)
    llm = LLM(case["model"], device="cpu", dtype=case["dtype"], weights=case["weights"])
    measured = (peak_bytes(torch.device("cpu")) or 0) - before
    estimate = load_peak(llm.config, Path(case["model"]), llm.dtype, case["weights"], llm.device)
    return {"dtype": llm.model.precision, "estimate": estimate, "measured": measured}


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """What a request takes, in bytes, by this process."""
    import torch

    from fastkv import LLM, SamplingParams
    from fastkv.engine.footprint import footprint, within_products
    from fastkv.engine.memory import peak_bytes

    torch.set_num_threads(case["threads"])
    with TemporaryDirectory() as bare:
        folder = without_tokenizer(Path(case["model"]), Path(bare)) if case["exact"] else case["model"]
        llm = LLM(folder, device="cpu", dtype=case["dtype"], weights=case["weights"])
    policy, params = POLICIES[case["policy"]](), SamplingParams(max_tokens=NEW, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    short, long = (
        torch.randint(3, llm.config.vocab_size, (count,), generator=generator).tolist()
        for count in (SHORT, case["tokens"])
    )
    llm.generate(short, params, policy)
    llm.free_buffers()
    request = llm._request(long, params, policy)
    needed = footprint(llm.model, request.plan, llm._slot_bytes(request))
    before = begin(trim=case["exact"])
    llm.generate(long, params, policy)
    return {
        "dtype": llm.model.precision,
        "cache": needed.cache,
        "buffers": needed.buffers,
        "scratch": needed.step + needed.lists + needed.held,
        "estimate": needed.total + within_products(llm.config, case["threads"]),
        "measured": (peak_bytes(llm.device) or 0) - before,
    }


def without_tokenizer(folder: Path, bare: Path) -> Path:
    """The model in an empty folder, without its tokenizer: reading one leaves holes in memory, which blocks may use."""
    for file in folder.iterdir():
        if file.name == "config.json" or ".safetensors" in file.name:
            (bare / file.name).symlink_to(file.resolve())
    return bare


def begin(trim: bool) -> int:
    """Resident bytes from which a peak counts. trim: what is free is given back to the system before."""
    import torch

    from fastkv.engine.memory import start_peak

    torch.ones(300, 300) @ torch.ones(300, 300)  # the libraries are there
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    start_peak(torch.device("cpu"))
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(case: dict[str, Any], exact: bool) -> dict[str, Any]:
    """The same by a process of its own."""
    environment = {**os.environ, "FASTKV_CALIBRATION": "off", "OMP_NUM_THREADS": str(case["threads"])}
    environment |= EXACT if exact else {}
    command = [sys.executable, __file__, "--case", json.dumps({**case, "exact": exact})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FastKVError(f"a case failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def ratio(found: dict[str, Any]) -> str:
    return f"{found['estimate'] / found['measured']:.2f}"


def name(model: str) -> str:
    """Of a model's folder, which may be called "model" in a folder of its own."""
    folder = Path(model)
    return f"{folder.parent.name}/{folder.name}" if folder.name == "model" else folder.name


def row(case: dict[str, Any], exact: dict[str, Any], usual: dict[str, Any]) -> str:
    """A line of the table of requests, in MiB."""
    cells = [name(case["model"]), exact["dtype"], case["policy"], f"{case['tokens']:,}"]
    cells += [mib(exact[key]) for key in ("cache", "buffers", "scratch", "estimate", "measured")]
    return f"| {' | '.join([*cells, ratio(exact), mib(usual['measured'])])} |"


def run(argv: Sequence[str]) -> None:
    args = parsed(argv)
    if args.case is not None:
        case = json.loads(args.case)
        print(json.dumps(measured(case) if case["tokens"] else measured_load(case)))
        return
    if not args.model:
        raise FastKVError("--model is required")
    policies = args.policies.split(",")
    for policy in policies:
        check_choice("policies", policy, POLICIES)
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    cases = [
        dict(zip(KEYS, (model, args.dtype, args.weights, policy, int(tokens), args.threads), strict=True))
        for model in args.model
        for policy in policies
        for tokens in args.tokens.split(",")
    ]
    for case in cases:
        print(row(case, child(case, exact=True), child(case, exact=False)), flush=True)
    print(f"\n{LOADING}\n|{'---|' * (LOADING.count('|') - 1)}")
    for model in args.model:
        case = {**cases[0], "model": model, "tokens": 0}
        found = child(case, exact=False)
        cells = (name(model), found["dtype"], mib(found["estimate"]), mib(found["measured"]), ratio(found))
        print(f"| {' | '.join(cells)} |", flush=True)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    made = Parser(prog="footprint.py", description="Memory of a request: worked out and measured, in MiB.")
    made.add_argument("--model", action="append", help="a model folder; may be given again")
    made.add_argument("--tokens", default="512,1024,2048,4096", help="prompt lengths (512,1024,2048,4096)")
    made.add_argument("--policies", default="fastkv,full,snapkv", help="(fastkv,full,snapkv)")
    made.add_argument("--dtype", default="float32", help="(float32)")
    made.add_argument("--weights", help="int8, or as --dtype says")
    made.add_argument("--threads", type=int, default=1, help="(1)")
    made.add_argument("--case", help=argparse.SUPPRESS)
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("footprint.py", lambda: run(sys.argv[1:] if argv is None else argv), {"policies"})


if __name__ == "__main__":
    sys.exit(main())
