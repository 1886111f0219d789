"""Load a model as the commands do: with a progress line on stderr while its weights are read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.progress import ProgressLine
from fastkv.kernels.torchrun import world_size

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.llm import LLM


def load_model(model: str | Path, threads: int | None = None, **settings: Any) -> LLM:
    """`LLM(model, **settings)`; threads: of the CPU, None being torch's choice."""
    import torch

    from fastkv.engine.llm import LLM

    if threads is not None:
        torch.set_num_threads(threads)
    with ProgressLine(sys.stderr) as line:
        return LLM(model, progress=lambda done, total: line.show(loading(done, total), done, total), **settings)


def load_by_flags(args: argparse.Namespace, policy: Policy | None) -> LLM:
    """The model that the flags of `add_machine_flags` and `add_engine_flags` name; of several ranks, their part."""
    return load_model(
        args.model,
        args.threads,
        policy=policy,
        dtype=args.dtype,
        weights=args.weights,
        kv_dtype=args.kv_dtype,
        share_layers=getattr(args, "share_layers", None),
        device=args.device,
        revision=args.revision,
        cuda_graph=not args.no_cuda_graph,
        compile=args.compile,
        attention=args.attention,
        offload=args.offload,
        draft_weights=getattr(args, "draft_weights", None),
        tensor_parallel=world_size(),
    )


def loading(done: int, total: int) -> str:
    """How much of the weights is there, in bytes."""
    return f"loading {done / 2**30:.1f} of {total / 2**30:.1f} GiB"
