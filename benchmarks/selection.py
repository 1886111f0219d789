"""What choosing costs: importance scores, top-k and the gather into the cache, in relation to their layer.

    python benchmarks/selection.py --model llama-100m --context 8192 32768

Prints medians over the full-context layers of FastKV's prefill, of all runs after the first.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from fastkv.console.parser import Parser, guarded
from fastkv.errors import check_integer


def timed(llm: Any, context: int, rounds: int) -> tuple[float, float]:
    """Median seconds of (selection, whole layer) over the layers before the TSP layer."""
    import torch
    from cost import wait_for

    from fastkv import FastKV
    from fastkv.engine.prefill import LayerRun

    policy = FastKV()
    times: dict[str, list[float]] = {"select": [], "layer": []}

    def watched(name: str) -> Any:
        real = getattr(LayerRun, name)

        def run(self: Any, *arguments: Any) -> Any:
            wait_for(llm.device)
            started = time.perf_counter()
            result = real(self, *arguments)
            wait_for(llm.device)
            times[name].append(time.perf_counter() - started)
            return result

        return real, run

    replaced = {name: watched(name) for name in times}
    ids = torch.randint(llm.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    try:
        for name, (_, run) in replaced.items():
            setattr(LayerRun, name, run)
        for _ in range(1 + rounds):
            llm.prefill(ids, policy)
    finally:
        for name, (real, _) in replaced.items():
            setattr(LayerRun, name, real)
    n_layers, full = llm.config.n_layers, policy.tsp_layer_of(llm.config.n_layers)
    counted = [index for index in range(n_layers, len(times["layer"])) if index % n_layers < full]
    select, layer = (statistics.median(times[name][index] for index in counted) for name in ("select", "layer"))
    return select, layer


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="selection.py", description="What choosing costs beside its layer.")
    parser.add_argument("--model", default="llama-100m", help="a preset, with random weights")
    parser.add_argument("--context", type=int, nargs="+", default=[8192], metavar="N", help="prompt lengths (8192)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="counted prefills (3)")
    parser.add_argument("--dtype", default="auto", metavar="T")
    parser.add_argument("--device", default="auto", metavar="D")
    args = parser.parse_args(argv)
    for context in args.context:
        check_integer("--context", context, 1)
    check_integer("--rounds", args.rounds, 1)

    from machine import machine

    from fastkv import LLM

    llm = LLM(args.model, dtype=args.dtype, device=args.device, load_format="dummy")
    about = machine(llm)
    print(f"{args.model}, {about['dtype']}, on {about['device']}; torch {about['torch']}, {about['date']}")
    for context in args.context:
        select, layer = timed(llm, context, args.rounds)
        print(
            f"{context:,} tokens: selection {1e3 * select:.2f} ms of the layer's {1e3 * layer:.2f} ms, "
            f"{100 * select / layer:.2f} %",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("selection.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
