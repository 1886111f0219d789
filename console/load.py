"""Load a model as the commands do: with a progress line on stderr while its weights are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.progress import ProgressLine

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM


def load_model(model: str | Path, threads: int | None = None, **settings: Any) -> LLM:
    """`LLM(model, **settings)`; threads: of the CPU, None being torch's choice."""
    import torch

    from fastkv.engine.llm import LLM

    if threads is not None:
        torch.set_num_threads(threads)
    with ProgressLine(sys.stderr) as line:
        return LLM(model, progress=lambda done, total: line.show(loading(done, total), done, total), **settings)


def loading(done: int, total: int) -> str:
    """How much of the weights is there, in bytes."""
    return f"loading {done / 2**30:.1f} of {total / 2**30:.1f} GiB"
