"""fastkv: long prompts made cheap by Token-Selective Propagation and a compressed KV cache (arXiv 2502.01068)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastkv.cache import policies as _policies
from fastkv.cache.policies import *  # noqa: F403
from fastkv.cache.policy import Observation as Observation
from fastkv.cache.policy import Policy as Policy
from fastkv.cache.policy import Stage as Stage
from fastkv.errors import FastKVError as FastKVError

if TYPE_CHECKING:
    from fastkv.cache.kv_cache import KVCache as KVCache
    from fastkv.engine.llm import LLM as LLM
    from fastkv.engine.output import Metrics as Metrics
    from fastkv.engine.output import Output as Output
    from fastkv.engine.output import Piece as Piece
    from fastkv.engine.output import RunInfo as RunInfo
    from fastkv.engine.prefill import Prefill as Prefill
    from fastkv.engine.sampler import SamplingParams as SamplingParams
    from fastkv.engine.session import Session as Session

__version__ = "0.1.0"

# The names that pull in torch are imported on first use, so that `fastkv-run --help` answers at once.
_LAZY = {
    "KVCache": "fastkv.cache.kv_cache",
    "LLM": "fastkv.engine.llm",
    "Metrics": "fastkv.engine.output",
    "Output": "fastkv.engine.output",
    "Piece": "fastkv.engine.output",
    "Prefill": "fastkv.engine.prefill",
    "RunInfo": "fastkv.engine.output",
    "SamplingParams": "fastkv.engine.sampler",
    "Session": "fastkv.engine.session",
}

if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted([*_policies.__all__, "FastKVError", "Observation", "Policy", "Stage", *_LAZY])

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
