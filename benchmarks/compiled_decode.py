"""Decoding by layers that went through torch.compile, on random caches: a JSON object a line, as each figure comes.

    python benchmarks/compiled_decode.py llama-100m --context 1024 8192

A part of gpu_suite.py, which runs it in a process of its own. No prefill runs, so only the form for one token compiles.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from fastkv.console.parser import Parser, guarded


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="compiled_decode.py", description="Compiled decoding.")
    parser.add_argument("model", help="a preset, with random weights")
    parser.add_argument("--context", type=int, nargs="+", default=[1024], metavar="N", help="entries (1024)")
    parser.add_argument("--apart", action="store_true", help="the end of a layer and the next one's beginning as two")
    parser.add_argument("--copy", type=float, metavar="BYTES", help="bytes/s of a copy on the device, to compare with")
    parser.add_argument("--dtype", default="auto", metavar="T")
    parser.add_argument("--device", default="auto", metavar="D")
    args = parser.parse_args(argv)

    import old_ways
    import synthetic
    from suite_steps import decoded_figures

    from fastkv import LLM
    from fastkv.cache.catalogue import POLICIES

    llm = LLM(args.model, device=args.device, dtype=args.dtype, load_format="dummy", compile=True)
    if args.apart:
        old_ways.apart(llm.model)
    for context in args.context:
        for name in ("fastkv", "full"):
            llm.free_buffers()
            policy, started = POLICIES[name](), time.perf_counter()
            result = synthetic.decode(llm, policy, context)
            figures = decoded_figures(result, llm, policy, context, 1, args.copy)
            case = {"case": f"{name} {context:,}", "all_s": time.perf_counter() - started}
            print(json.dumps({**case, **figures}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("compiled_decode.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
