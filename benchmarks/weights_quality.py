"""What int8 weights cost in accuracy: perplexity of a text, and how far the next token's probabilities move.

    python benchmarks/weights_quality.py --model FOLDER --text docs/walkthrough.md docs/accuracy.md

The text is cut into passages of --context tokens; in each, every token but the first is predicted, by the products of a
prefill. The last --steps tokens of the text are predicted one by one, too: decode steps may multiply otherwise
(kernels/int8.py). KL: of the probabilities with float weights from those with int8 ones, in nats, mean over tokens;
same: how often the most probable token is the same. int4 is a simulation, for comparison: groups of at most 128
weights, each with its own scale and offset, rounded to the nearest of 16 levels.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.console.files import read_text
from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_integer

if TYPE_CHECKING:
    from torch import Tensor

    from fastkv import LLM

_GROUP = 128


@dataclass
class Sums:
    """Over predicted tokens: their number, minus log probabilities, KL and agreement with the float weights."""

    count: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0

    def add(self, logits: Tensor, expected: Tensor, ids: Tensor) -> None:
        """logits and `expected`, those with float weights: float32 [T, V]; ids: int64 [T], the tokens that came."""
        ours, theirs = logits.log_softmax(-1), expected.log_softmax(-1)
        self.count += len(ids)
        self.loss -= float(ours.gather(1, ids[:, None]).sum())
        self.divergence += float((theirs.exp() * (theirs - ours)).sum())
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.count)


def all_logits(llm: LLM, ids: Tensor) -> Tensor:
    """Logits after every token of ids, int64 [1, T]: float32 [T, V]."""
    from fastkv.engine.attention import causal_attention

    model = llm.model
    hidden, rope = model.embed(ids), model.rope_of_range(0, ids.shape[1])
    for block, window in zip(model.blocks, llm.config.windows, strict=True):
        q, k, v = block.project(hidden, rope)
        block.finish_(hidden, causal_attention(q, k, v, window))
    return model.head(hidden)[0]


def step_logits(llm: LLM, ids: Tensor, steps: int) -> Tensor:
    """Logits of the last `steps` tokens of ids, int64 [1, T], made one by one: float32 [steps, V]."""
    import torch

    from fastkv import FullKV

    begun = llm.prefill(ids[:, :-steps], FullKV(), max_tokens=steps)
    return torch.cat([llm.decode(begun.cache, token) for token in ids[0, -steps:, None]])


def to_int4(llm: LLM) -> None:
    """Round every matrix of products in place, the head included."""
    from fastkv.models.linear import Linear

    done: set[int] = set()
    for module in llm.model.modules():
        if isinstance(module, Linear) and module.weight.data_ptr() not in done:
            done.add(module.weight.data_ptr())
            group = math.gcd(module.weight.shape[1], _GROUP)
            parts = module.weight.unflatten(1, (-1, group))
            low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
            step = ((high - low) / 15).clamp_min_(1e-12)
            parts.copy_(((parts - low) / step).round_() * step + low)


def measured(args: argparse.Namespace) -> Iterator[tuple[str, Sums, Sums]]:
    """(weights, sums over passages, sums over steps) of each kind."""
    import torch

    from fastkv import LLM

    plain = LLM(args.model, dtype="float32", device="cpu")
    if plain.tokenizer is None:
        raise FastKVError(f"{args.model}: no tokenizer, so text cannot be read")
    text = "\n\n".join(read_text(Path(name), "text")[1] for name in args.text)
    ids = torch.tensor([plain.tokenizer.encode(text)])[:, : args.tokens]
    if ids.shape[1] < max(args.context, args.steps + 2):
        raise FastKVError(f"--text has {ids.shape[1]} tokens; give more, or a shorter --context")
    passages = [part for part in ids.split(args.context, dim=1) if part.shape[1] > 1]
    rest = ids[:, -min(args.context, ids.shape[1]) :]
    kinds = {"float32": {}, "int8": {"weights": "int8"}, "int4": {}}
    for name, settings in kinds.items():
        llm = LLM(args.model, dtype="float32", device="cpu", **settings)  # type: ignore[arg-type]
        if name == "int4":
            to_int4(llm)
        whole, stepped = Sums(), Sums()
        for part in passages:  # the float weights' logits anew for each kind: those of a whole text take gigabytes
            whole.add(all_logits(llm, part)[:-1], all_logits(plain, part)[:-1], part[0, 1:])
        ours, theirs = (step_logits(each, rest, args.steps)[:-1] for each in (llm, plain))
        stepped.add(ours, theirs, rest[0, -args.steps + 1 :])
        yield name, whole, stepped


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="weights_quality.py", description="What int8 weights cost in accuracy.")
    parser.add_argument("--model", required=True, help="a model folder or a hub id")
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="UTF-8 text, one after the other")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="of the text, at most (16384)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a passage (1024)")
    parser.add_argument(
        "--steps", type=int, default=256, metavar="N", help="tokens that are predicted one by one (256)"
    )
    args = parser.parse_args(argv)
    for name in ("tokens", "context", "steps"):
        check_integer(f"--{name}", getattr(args, name), 2)

    import torch

    with torch.inference_mode():
        print(
            "| weights | perplexity | change | KL | same | KL of steps | same, steps |\n|---|---|---|---|---|---|---|"
        )
        base = None
        for name, whole, stepped in measured(args):
            base = base or whole.perplexity
            cells = (
                f"{whole.perplexity:.3f}",
                f"{100 * (whole.perplexity / base - 1):+.2f} %",
                *(
                    cell
                    for sums in (whole, stepped)
                    for cell in (f"{sums.divergence / sums.count:.5f}", f"{100 * sums.same / sums.count:.1f} %")
                ),
            )
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    return guarded("weights_quality.py", lambda: run(sys.argv[1:] if argv is None else argv), ("text",))


if __name__ == "__main__":
    sys.exit(main())
