"""Is the memory that fastkv-plan says what a process takes? Each case is a process of its own, on a CPU.

    python benchmarks/plan_memory.py

A process answers a short prompt with a tiny model, so that the libraries are there, and lets go of it. Then it loads
the model of the case, with random weights, and answers a prompt of random tokens: all that is counted is its peak of
resident memory less what was resident before that. *exact* and *as usual* are as in footprint.py. For Linux with glibc.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from footprint import EXACT, begin, mib

from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError

NEW = 32  # tokens of every answer
_TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_SMALL = {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "head_dim": 64}
_SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2**17, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"architectures": ["LlamaForCausalLM"], **_TINY},
    "qwen3-75m": {"architectures": ["Qwen3ForCausalLM"], **_SMALL},
}
KEYS = ("model", "dtype", "policy", "kv_dtype", "tokens")
CASES = (
    ("llama-100m", "float32", "full", None, 2048),
    ("llama-100m", "float32", "fastkv", None, 4096),
    ("llama-100m", "float32", "full", "int8", 2048),
    ("llama-100m", "bfloat16", "snapkv", None, 2048),
    ("qwen3-75m", "float32", "adakv", None, 2048),
    ("qwen3-75m", "float32", "h2o", None, 2048),
    ("qwen3-75m", "float32", "gemfilter", None, 2048),
    ("qwen3-75m", "bfloat16", "full", None, 4096),
)
HEADER = "| model | dtype | policy | tokens | weights | KV cache | working | plan | exact | ratio | as usual | ratio |"


def config_folder(name: str, into: Path) -> str:
    """A model by its name: a preset as it is, one of SHAPES as a folder that holds its config.json."""
    if name not in SHAPES:
        return name
    folder = into / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SHAPES[name], "torch_dtype": "float32"}))
    return str(folder)


def planned_case(case: dict[str, Any], threads: int) -> dict[str, Any]:
    """What fastkv-plan says of a case, through the command itself."""
    argv = ["--model", case["model"], "--context", str(case["tokens"]), "--max-tokens", str(NEW), "--json"]
    argv += ["--policy", case["policy"], "--device", "cpu", "--dtype", case["dtype"], "--threads", str(threads)]
    argv += [] if case["kv_dtype"] is None else ["--kv-dtype", case["kv_dtype"]]
    code = "import sys; from fastkv.console.plan.command import main; sys.exit(main())"
    return run_json([sys.executable, "-c", code, *argv], dict(os.environ))


def run_json(command: list[str], environment: dict[str, str]) -> Any:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FastKVError(f"a case failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout)


def measured(case: dict[str, Any]) -> int:
    """Bytes that this process takes for loading the model and answering."""
    import torch

    from fastkv import LLM, SamplingParams
    from fastkv.cache.catalogue import POLICIES
    from fastkv.engine.memory import peak_bytes

    torch.set_num_threads(case["threads"])
    policy, params = POLICIES[case["policy"]](), SamplingParams(max_tokens=NEW, ignore_eos=True)
    settings = {"device": "cpu", "dtype": case["dtype"], "kv_dtype": case["kv_dtype"], "load_format": "dummy"}
    LLM(case["tiny"], **settings).generate([7] * 600, params, policy)
    gc.collect()
    before = begin(trim=True)
    llm = LLM(case["model"], **settings)
    ids = torch.randint(3, llm.config.vocab_size, (case["tokens"],), generator=torch.Generator().manual_seed(0))
    llm.generate(ids.tolist(), params, policy)
    return (peak_bytes(llm.device) or 0) - before


def row(case: dict[str, Any], threads: int) -> str:
    """A line of the table, in MiB."""
    environment = {**os.environ, "FASTKV_CALIBRATION": "off", "OMP_NUM_THREADS": str(threads)}
    plan = planned_case(case, threads)
    command = [sys.executable, __file__, "--case", json.dumps({**case, "threads": threads})]
    exact, usual = (run_json(command, {**environment, **more}) for more in (EXACT, {}))
    stored = f", {case['kv_dtype']} entries" if case["kv_dtype"] else ""
    cells = [Path(case["model"]).name, case["dtype"] + stored, case["policy"], f"{case['tokens']:,}"]
    cells += [mib(size) for size in plan["memory_bytes"].values()]
    cells += [mib(plan["needed_bytes"]), mib(exact), f"{plan['needed_bytes'] / exact:.2f}"]
    return f"| {' | '.join([*cells, mib(usual), format(plan['needed_bytes'] / usual, '.2f')])} |"


def run(argv: Sequence[str]) -> None:
    args = parsed(argv)
    if args.case is not None:
        print(json.dumps(measured(json.loads(args.case))))
        return
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    with TemporaryDirectory() as name:
        folders = {shape: config_folder(shape, Path(name)) for shape in SHAPES}
        for values in CASES[: args.most]:
            case = dict(zip(KEYS, values, strict=True))
            case |= {"model": folders.get(case["model"], case["model"]), "tiny": folders["tiny"]}
            print(row(case, args.threads), flush=True)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    made = Parser(prog="plan_memory.py", description="Memory of a process: planned and measured, in MiB.")
    made.add_argument("--threads", type=int, default=1, help="(1)")
    made.add_argument("--most", type=int, default=len(CASES), help="cases (all)")
    made.add_argument("--case", help=argparse.SUPPRESS)
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("plan_memory.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
