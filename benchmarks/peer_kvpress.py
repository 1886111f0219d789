"""What the presses of NVIDIA's kvpress keep of the same texts, at equal bytes: right answers in %, beside fastkv's.

    pip install kvpress==0.5.5 transformers
    python benchmarks/peer_kvpress.py --model FOLDER --task niah_single --length 1024 --examples 4 --kv-retention 0.1

The texts are those of `fastkv-eval` with the same --seed, the question is part of what is compressed, and answers are
greedy. Every press keeps int(RATE * tokens) entries a head in the mean, as `fastkv:min_tokens=1` does; none of them
drops tokens in the prefill. With --output FILE.jsonl a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.console.jsonl import RecordFile
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.runner import Plan, Question, Runner
from fastkv.eval.tasks import build_tasks


def presses(share_dropped: float) -> dict[str, Callable[[], Any]]:
    """kvpress's methods by name, with their own defaults, at this compression ratio."""
    import kvpress as kp

    snap = {"compression_ratio": share_dropped}
    return {
        "SnapKV": lambda: kp.SnapKVPress(**snap),
        "PyramidKV": lambda: kp.PyramidKVPress(**snap),
        "AdaKV": lambda: kp.AdaKVPress(kp.SnapKVPress(**snap)),
        "CriticalAdaKV": lambda: kp.CriticalAdaKVPress(kp.SnapKVPress(**snap)),
        "TOVA": lambda: kp.TOVAPress(**snap),
        "KeyDiff": lambda: kp.KeyDiffPress(**snap),
        "ExpectedAttention": lambda: kp.ExpectedAttentionPress(**snap),
        "Compactor": lambda: kp.CompactorPress(**snap),
        "ChunkKV": lambda: kp.ChunkKVPress(press=kp.SnapKVPress(**snap), chunk_length=20),
        "KVzip": lambda: kp.KVzipPress(**snap),
    }


class Peer:
    """The model in transformers, answering greedily over a cache that a press has compressed."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.model.config
        if not hasattr(config, "head_dim"):  # which some presses read, and Qwen2's config has not
            config.head_dim = config.hidden_size // config.num_attention_heads
        stated = self.model.generation_config.eos_token_id
        self.eos = set(stated if isinstance(stated, list) else [stated])

    @torch.inference_mode()
    def answer(self, ids: list[int], press: Any, max_tokens: int) -> list[int]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        prompt = torch.tensor([ids])
        with press(self.model):
            # The base model, as kvpress itself does; its last hidden state gives the first token.
            hidden = self.model.model(input_ids=prompt, past_key_values=cache).last_hidden_state[:, -1:]
        token = int(self.model.lm_head(hidden)[0, -1].argmax())
        made: list[int] = []
        while token not in self.eos and len(made) < max_tokens:
            made.append(token)
            position = torch.tensor([[len(ids) + len(made) - 1]])
            step = self.model(input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=position)
            token = int(step.logits[0, -1].argmax())
        return made


def main() -> int:
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    llm, peer = LLM(args.model, dtype="float32", policy=FullKV()), Peer(args.model)
    specs = [PolicySpec("full", FullKV()), PolicySpec("fastkv", FastKV(kv_retention=args.kv_retention, min_tokens=1))]
    plan = Plan(
        tasks=tuple(build_tasks(args.task)),
        lengths=tuple(args.length),
        depths=tuple(args.depth),
        examples=args.examples,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )
    runner = Runner(llm, plan, specs, args.chat, not args.no_lead)
    records = None if args.output is None else RecordFile(args.output)
    earlier = [] if records is None else records.objects
    there = {(one["id"], one["method"]): one["score"] for one in earlier}
    scores: dict[tuple[str, str], list[float]] = {}
    for slot in plan.slots():
        question = runner.question(slot)
        for name, ask in _methods(args, llm, peer, specs, question).items():
            key = (question.slot.id, name)
            if key not in there:
                there[key] = plan.task(slot.task).score(ask(), question.example)
                if records is not None:
                    records.append({"id": key[0], "method": name, "score": there[key]})
            scores.setdefault((slot.task, name), []).append(there[key])
            print(f"{slot.id} {name} {there[key]:g}", file=sys.stderr)
    for (task, name), some in scores.items():
        print(f"{task:14} {name:18} {100 * fmean(some):5.1f}  (n = {len(some)})")
    return 0


def _methods(
    args: argparse.Namespace, llm: LLM, peer: Peer, specs: list[PolicySpec], question: Question
) -> dict[str, Callable[[], str]]:
    """Every method by name, as a function that answers the question."""
    ids, params = question.ids, SamplingParams(max_tokens=args.max_tokens)
    kept = int(args.kv_retention * len(ids))
    assert llm.tokenizer is not None
    decode = llm.tokenizer.decode
    asked: dict[str, Callable[[], str]] = {
        spec.label: lambda spec=spec: llm.generate(ids, params, policy=spec.policy).text  # type: ignore[misc]
        for spec in specs
    }
    # A press keeps int(tokens * (1 - ratio)): half a token more, so that rounding never takes one away.
    for name, make in presses(1 - (kept + 0.5) / len(ids)).items():
        if name in args.press:
            asked[name] = lambda make=make: decode(peer.answer(ids, make(), args.max_tokens))  # type: ignore[misc]
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", nargs="+", default=["niah_single"])
    parser.add_argument("--length", type=int, nargs="+", default=[1024])
    parser.add_argument("--depth", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--kv-retention", type=float, default=0.1)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--no-lead", action="store_true")
    parser.add_argument("--press", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    return parser


NAMES = (
    *("SnapKV", "PyramidKV", "AdaKV", "CriticalAdaKV", "TOVA", "KeyDiff", "ExpectedAttention", "Compactor"),
    *("ChunkKV", "KVzip"),
)

if __name__ == "__main__":
    sys.exit(main())
