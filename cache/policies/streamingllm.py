"""StreamingLLM: the first few tokens and the most recent ones, whatever they say (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.policy import Observation
from fastkv.errors import FastKVError, check_integer


@dataclass(frozen=True)
class StreamingLLM(Compressed):
    """Attention sinks and a recent window; nothing is scored.

    kv_retention, kv_len, min_tokens: the budget of a layer, of which the first `sinks` tokens of the prompt are part
    and the most recent ones are the rest.

    What differs from the paper: it compresses the prompt once, and the answer is added to what was kept; the original
    also drops old tokens while it writes. Positions stay the true ones, where the original counts them anew inside the
    cache. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "streamingllm"
    compresses_again: ClassVar[bool] = True
    window: ClassVar[int] = 1  # type: ignore[misc]

    kv_retention: float = 0.1
    kv_len: int | None = None
    sinks: int = 4
    min_tokens: int = 128

    def __post_init__(self) -> None:
        check_integer("sinks", self.sinks, 0)
        self.check_budget()
        for name in ("kv_len", "min_tokens"):
            value = getattr(self, name)
            if value is not None and value <= self.sinks:
                raise FastKVError(f"{name} must be more than the sinks ({self.sinks}), not {value}", setting=name)

    def score(self, observed: Observation) -> Tensor:
        """The later the better, but for the sinks, which are the best."""
        batch, n_heads, n_tokens, _ = observed.k.shape
        scores = torch.arange(n_tokens - self.window, dtype=torch.float32, device=observed.k.device)
        scores[: self.sinks] += n_tokens
        return scores.expand(batch, n_heads, -1)
