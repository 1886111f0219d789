"""KVzip: what the model attends to when it repeats the prompt, whatever is asked later (arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.policy import Observation, Probe
from fastkv.cache.setting import setting, switch, whole
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor

FIRST = "\n\nNow repeat the text above word for word:\n\n"
LATER = "\n\nNow repeat the part of the text above that begins after these words:\n\n"


@dataclass(frozen=True, kw_only=True)
class KVzip(Compressed):
    """After the prefill the model repeats the prompt (engine/probe.py); what it attends to most is kept.

    kv_retention, kv_len, min_tokens: the MEAN budget of all heads. across_layers: the heads of all layers compete for
    it; else those of each layer do. sinks: the first tokens, always kept, as the last one is. chunk: tokens that the
    model repeats at a time at most, and less where its positions end; a model that cannot repeat long passages, as that
    of examples/archive, needs shorter ones (there at most 512). instruct: whether it is asked to, in words; else
    it only sees the chunk once more, after the tokens before it. A model without a tokenizer is never asked.

    Nothing is dropped during the prefill, which then takes two to three times as long, and holds K and V of all tokens
    until its end. A sequence that continues from a cache keeps what was kept, and the new tokens whole.

    What differs from the paper stands in engine/probe.py. Raises FastKVError for a value out of range, and for a prompt
    after which the model has too few positions left to repeat any of it.
    """

    name: ClassVar[str] = "kvzip"
    window = 1
    per_head: ClassVar[bool] = True
    over_layers: ClassVar[bool] = True

    sinks: int = setting(4, whole(0), "first tokens that are always kept", metavar="N")
    chunk: int = setting(2000, whole(1), "tokens of the prompt that the model repeats at a time", metavar="N")
    across_layers: bool = setting(True, switch(), "heads of all layers compete, not those of each", metavar="yes|no")
    instruct: bool = setting(True, switch(), "ask the model in words to repeat the prompt", metavar="yes|no")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_len", "min_tokens"):
            value = getattr(self, name)
            if value is not None and value <= self.sinks:
                raise FastKVError(f"{name} must be more than the sinks ({self.sinks}), not {value}", setting=name)

    @property
    def probe(self) -> Probe:
        first, later = (FIRST, LATER) if self.instruct else ("", "")
        return Probe(self.chunk, self.sinks, first, later)

    def score(self, observed: Observation) -> Tensor:
        assert observed.probed is not None, "the engine probes before it asks"
        scores = observed.probed[..., : -self.window].clone()
        scores[..., : self.sinks] = 2  # attention is at most 1
        return scores

    def model_budgets(self, counts: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        import torch

        from fastkv.cache.selection import competed_counts

        if not self.across_layers:
            pairs = zip(scores, counts, strict=True)
            return [competed_counts(of_layer, count, self.window, 0) for of_layer, count in pairs]
        together = competed_counts(torch.cat(tuple(scores), dim=1), counts[0], self.window, 0)
        return list(together.chunk(len(scores), dim=1))
