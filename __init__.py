"""fastkv: long prompts made cheap by Token-Selective Propagation and a compressed KV cache (arXiv 2502.01068)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from fastkv.cache.policies import (
        ASL,
        H2O,
        AdaKV,
        FastKV,
        FullKV,
        GemFilter,
        HeadKV,
        PyramidInfer,
        PyramidKV,
        SnapKV,
        StreamingLLM,
        StructKV,
    )
    from fastkv.engine.llm import LLM
    from fastkv.engine.output import Metrics, Output, Piece, RunInfo
    from fastkv.engine.prefill import Prefill
    from fastkv.engine.sampler import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "ASL",
    "H2O",
    "LLM",
    "AdaKV",
    "FastKV",
    "FastKVError",
    "FullKV",
    "GemFilter",
    "HeadKV",
    "Metrics",
    "Output",
    "Piece",
    "Prefill",
    "PyramidInfer",
    "PyramidKV",
    "RunInfo",
    "SamplingParams",
    "SnapKV",
    "StreamingLLM",
    "StructKV",
]

# The names that pull in torch are imported on first use, so that `fastkv-run --help` answers at once.
_LAZY = {
    **dict.fromkeys(
        (
            *("ASL", "AdaKV", "FastKV", "FullKV", "GemFilter", "H2O", "HeadKV", "PyramidInfer", "PyramidKV", "SnapKV"),
            *("StreamingLLM", "StructKV"),
        ),
        "fastkv.cache.policies",
    ),
    "LLM": "fastkv.engine.llm",
    "Metrics": "fastkv.engine.output",
    "Output": "fastkv.engine.output",
    "Piece": "fastkv.engine.output",
    "RunInfo": "fastkv.engine.output",
    "Prefill": "fastkv.engine.prefill",
    "SamplingParams": "fastkv.engine.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
