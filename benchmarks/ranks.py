"""Whether several ranks answer as one process does, token for token, and how much of its memory each of them holds.

    torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py --model examples/archive/model

Each rank loads its part of a model; rank 0 loads the whole model, too, and answers the same prompts alone. --model: a
folder, any number of times; prompts are texts of its tokenizer, or random tokens where it has none. Besides them small
models of random weights of the families in FAMILIES are compared, on random tokens. --memory: a preset whose weights
and entries of a full cache and of FastKV's are counted on a rank and in one process. Float32, greedy.
Prints a line for each model and policy; --json writes every answer that differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.parser import Parser, guarded
from fastkv.kernels.torchrun import rank, world_size

if TYPE_CHECKING:
    from fastkv import LLM, Policy

POLICIES = ("full", "fastkv", "snapkv", "adakv", "h2o", "structkv")
SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
FAMILIES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
}


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="ranks.py", description="Several ranks against one process.")
    made.add_argument("--model", action="append", default=[], metavar="PATH", help="a model folder; repeatable")
    made.add_argument("--prompts", type=int, default=50, metavar="N", help="for each model and policy (50)")
    made.add_argument("--length", type=int, default=400, metavar="N", help="tokens of a prompt (400)")
    made.add_argument("--new-tokens", type=int, default=16, metavar="N", help="of each answer (16)")
    made.add_argument("--policies", default=",".join(POLICIES), metavar="P,…", help=f"({', '.join(POLICIES)})")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu (gloo, default) or cuda (NCCL)")
    made.add_argument("--memory", metavar="PRESET", help="count the memory of this preset instead")
    made.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of --memory (4096)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write what differs there")
    return made


def loaded(model: str, ranks: int, device: str) -> LLM:
    """A model in `ranks` parts, of random weights where its folder has none."""
    from fastkv import LLM
    from fastkv.models.presets import PRESETS

    random = model in PRESETS or not list(Path(model).glob("*.safetensors*"))
    settings: dict[str, Any] = {"load_format": "dummy"} if random else {}
    return LLM(model, device=device, dtype="float32", tensor_parallel=ranks, **settings)


def families(folder: Path) -> Iterator[tuple[str, str]]:
    """(family, folder) of each small model, of which only the config.json is written."""
    for name, architecture in FAMILIES.items():
        place = folder / f"{name}-{rank()}"
        place.mkdir()
        values = {"architectures": [architecture], "model_type": name, **SIZES}
        (place / "config.json").write_text(json.dumps(values))
        yield name, str(place)


def prompts_of(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Prompts of so many tokens: texts of the archive task, or random ones where the model reads no text."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = llm.config.vocab_size
    if llm.tokenizer is None:
        return torch.randint(0, size, (count, length), generator=generator).tolist()
    words = Path(__file__).parent.parent.joinpath("docs", "walkthrough.md").read_text(encoding="utf-8")
    ids = llm.tokenizer.encode(words)
    starts = torch.randint(0, max(1, len(ids) - length), (count,), generator=generator).tolist()
    return [ids[start : start + length] for start in starts]


def compare(name: str, model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What differs between the ranks' answers and one process's; a line for each policy."""
    from fastkv import SamplingParams
    from fastkv.cache.catalogue import POLICIES as KNOWN

    parts, whole = loaded(model, world_size(), args.device), loaded(model, 1, args.device) if rank() == 0 else None
    prompts = prompts_of(parts, args.prompts, args.length)
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
    differing: list[dict[str, Any]] = []
    for policy_name in args.policies.split(","):
        policy = KNOWN[policy_name]()
        found = answers(parts, prompts, params, policy)
        if whole is None:
            continue
        wanted = answers(whole, prompts, params, policy)
        wrong = [i for i, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other]
        told = {"model": name, "policy": policy_name}
        differing += [{**told, "prompt": i, "ranks": found[i], "one": wanted[i]} for i in wrong]
        print(f"{name:10} {policy_name:10} {len(prompts) - len(wrong)} of {len(prompts)} identical", flush=True)
    return differing


def answers(llm: LLM, prompts: Sequence[list[int]], params: Any, policy: Policy) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(list(prompts), params, policy)]


def memory(model: str, context: int, device: str) -> None:
    """Weights and entries of a request, of a rank and of one process."""
    import torch

    from fastkv import FastKV, FullKV

    def held(llm: LLM, policy: Policy) -> tuple[int, int]:
        ids = torch.randint(0, llm.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
        cache = llm.prefill(ids, policy, max_tokens=64).cache
        return sum(each.nbytes for each in llm.model.parameters()), cache.nbytes

    policies = (FullKV(), FastKV())
    of_rank = [held(llm, policy) for llm in [loaded(model, world_size(), device)] for policy in policies]
    if rank() > 0:
        return
    of_one = [held(llm, policy) for llm in [loaded(model, 1, device)] for policy in policies]
    for policy, mine, whole in zip(policies, of_rank, of_one, strict=True):
        sizes = ", ".join(
            f"{what} {one / 2**20:.1f} of {other / 2**20:.1f} MiB"
            for what, one, other in zip(("weights", "entries"), mine, whole, strict=True)
        )
        print(f"{model} {policy.name}, {context} tokens: a rank of {world_size()} holds {sum(mine) / sum(whole):.3f}")
        print(f"  {sizes}")


def run(args: argparse.Namespace) -> int:
    if args.memory is not None:
        memory(args.memory, args.context, args.device)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        models = [(Path(model).resolve().parent.name, model) for model in args.model]
        models += families(Path(folder))
        differing = [each for name, model in models for each in compare(name, model, args)]
    if rank() == 0:
        print(f"{len(differing)} answers differ")
        if args.json is not None:
            args.json.write_text(json.dumps(differing))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(guarded("ranks.py", lambda: run(parser().parse_args()), takes_ranks=True))
