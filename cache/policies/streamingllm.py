"""StreamingLLM: the first few tokens and the most recent ones, whatever they say (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.policy import Observation
from fastkv.cache.setting import setting, whole
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Compressed):
    """Attention sinks and a recent window; nothing is scored.

    kv_retention, kv_len, min_tokens: the budget of a layer, of which the first `sinks` tokens of the prompt are part
    and the most recent ones are the rest.

    What differs from the paper: it compresses the prompt once, and the answer is added to what was kept; the original
    also drops old tokens while it writes. Positions stay the true ones, where the original counts them anew inside the
    cache. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "streamingllm"
    window = 1
    compresses_again: ClassVar[bool] = True
    scores_on_host: ClassVar[bool] = True

    sinks: int = setting(4, whole(0), "first tokens that are always kept", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_len", "min_tokens"):
            value = getattr(self, name)
            if value is not None and value <= self.sinks:
                raise FastKVError(f"{name} must be more than the sinks ({self.sinks}), not {value}", setting=name)

    def score(self, observed: Observation) -> Tensor:
        """The later the better, but for the sinks, which are the best.

        Among entries that were kept earlier the sinks are still the first ones.
        """
        import torch

        batch, n_heads, n_tokens, _ = observed.k.shape
        scores = torch.arange(n_tokens - self.window, dtype=torch.float32, device=observed.k.device)
        scores[: self.sinks] += n_tokens
        return scores.expand(batch, n_heads, -1)
