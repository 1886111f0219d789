"""Where the time goes: the operations of a prefill and of decode steps, the costly ones first.

    python benchmarks/operations.py --model llama-100m --context 4096 --policy fastkv

On a GPU these are its kernels, and what the device spent between them is idle; on a CPU, torch's operations without
those that they call. The steps of several prompts (`--batch`) are run eagerly, without graphs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkv.console.parser import Parser, guarded
from fastkv.errors import check_choice, check_integer

if TYPE_CHECKING:
    import torch

    from fastkv import LLM, SamplingParams
    from fastkv.cache.policy import Policy


@dataclass(frozen=True)
class Share:
    """One operation: how often it ran, and for how many seconds in all."""

    name: str
    count: int
    seconds: float


def profiled(work: Callable[[], object], device: torch.device) -> tuple[float, list[Share]]:
    """Seconds that `work` took without the profiler, and its operations, the costly ones first."""
    import torch
    from cost import wait_for
    from torch.profiler import ProfilerActivity, profile

    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    seconds = time.perf_counter() - started
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        work()
        wait_for(device)
    shares = [
        Share(event.key, event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6)
        for event in recorded.key_averages()
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return seconds, sorted(shares, key=lambda share: -share.seconds)


def lines(title: str, seconds: float, shares: list[Share], top: int) -> Iterator[str]:
    """A table of the first `top` operations."""
    busy = sum(share.seconds for share in shares)
    yield f"\n{title}: {1e3 * seconds:,.2f} ms; {len(shares)} kinds of operations took {1e3 * busy:,.2f} ms"
    yield "| ms | share | calls | |\n|---|---|---|---|"
    for share in shares[:top]:
        name = share.name if len(share.name) <= 90 else share.name[:87] + "..."
        yield f"| {1e3 * share.seconds:,.2f} | {100 * share.seconds / busy:.1f} % | {share.count} | {name} |"


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="operations.py", description="Where the time of prefill and decoding goes.")
    parser.add_argument("--model", default="llama-100m", help="a preset, with random weights")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="prompt length (4096)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts that decode together (1)")
    parser.add_argument("--policy", default="fastkv", metavar="NAME")
    parser.add_argument("--new-tokens", type=int, default=17, metavar="N", help="tokens to generate (17)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="operations to show (20)")
    parser.add_argument("--dtype", default="auto", metavar="T")
    parser.add_argument("--device", default="auto", metavar="D")
    args = parser.parse_args(argv)
    for name, low in (("context", 1), ("batch", 1), ("new_tokens", 2), ("top", 1)):
        check_integer("--" + name.replace("_", "-"), getattr(args, name), low)

    import torch
    from machine import machine

    from fastkv import LLM, SamplingParams
    from fastkv.cache.catalogue import POLICIES

    check_choice("--policy", args.policy, POLICIES)
    llm = LLM(args.model, dtype=args.dtype, device=args.device, load_format="dummy")
    policy = POLICIES[args.policy]()
    shape = (args.batch, args.context)
    ids = torch.randint(llm.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    llm.generate(ids[0].tolist(), params, policy)  # warm up, and capture where there is something to capture

    about = machine(llm)
    size = f"{args.context:,} tokens" if args.batch == 1 else f"{args.batch} x {args.context:,} tokens"
    print(f"{args.model}, {args.policy}, {size}, {about['dtype']}, on {about['device']}; torch {about['torch']}")
    print("\n".join(lines("prefill", *profiled(lambda: llm.prefill(ids, policy), llm.device), args.top)))
    step = one_step(llm, ids, params, policy)
    step()
    half = (args.new_tokens - 1) // 2  # profiled() works twice

    def decode() -> None:
        for _ in range(half):
            step()

    print("\n".join(lines(f"{half} decode steps", *profiled(decode, llm.device), args.top)))


def one_step(llm: LLM, ids: torch.Tensor, params: SamplingParams, policy: Policy) -> Callable[[], object]:
    """What makes the next token of each prompt, ids int64 [B, N]."""
    if ids.shape[0] == 1:
        stream = llm.stream(ids[0].tolist(), params, policy)
        return lambda: next(stream)
    before = llm.prefill(ids, policy, max_tokens=params.max_tokens or 1)
    tokens = before.logits.argmax(-1)

    def step() -> None:
        tokens.copy_(llm.decode(before.cache, tokens).argmax(-1))

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("operations.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
