"""KVzip: what the model attends to when it repeats the prompt, whatever is asked later (arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.agnostic import QueryAgnostic
from fastkv.cache.policy import Observation, Probe
from fastkv.cache.setting import no_setting, redefined, setting, switch, whole

if TYPE_CHECKING:
    from torch import Tensor

FIRST = "\n\nNow repeat the text above word for word:\n\n"
LATER = "\n\nNow repeat the part of the text above that begins after these words:\n\n"


@dataclass(frozen=True, kw_only=True)
class KVzip(QueryAgnostic):
    """After the prefill the model repeats the prompt (engine/probe.py); what it attends to most is kept.

    budgets, head_floor, sinks, window: see QueryAgnostic. chunk: tokens that the model repeats at a time at most, and
    less where its positions end; a model that cannot repeat long passages, as that of examples/archive, needs shorter
    ones. instruct: whether it is asked to, in words; else it only sees the chunk once more, after the tokens before it.
    A model without a tokenizer is never asked.

    Nothing is dropped during the prefill, which then takes two to three times as long, and holds K and V of all tokens
    until its end. A sequence that continues from a cache keeps what was kept, and the new tokens whole.

    What differs from the paper stands in engine/probe.py. Raises FastKVError for a value out of range, and for a prompt
    after which the model has too few positions left to repeat any of it.
    """

    name: ClassVar[str] = "kvzip"
    per_head = True
    over_layers = True

    budgets: str = redefined(QueryAgnostic, "budgets", "model")
    head_floor: float = redefined(QueryAgnostic, "head_floor", 0.0)
    window: int = redefined(QueryAgnostic, "window", 1)
    # All layers share one budget, and are chosen from at once.
    keep_mass: float | None = no_setting(None)
    keep_mass_by: str = no_setting("layer")
    keep_mass_most: float = no_setting(1.0)
    tsp_layer: int | None = no_setting(None)  # the whole prompt is repeated, by all layers
    tsp_rate: float = no_setting(1.0)
    chunk: int = setting(2000, whole(1), "tokens of the prompt that the model repeats at a time", metavar="N")
    instruct: bool = setting(True, switch(), "ask the model in words to repeat the prompt", metavar="yes|no")

    @property
    def probe(self) -> Probe:
        first, later = (FIRST, LATER) if self.instruct else ("", "")
        return Probe(self.chunk, self.sinks, first, later)

    def between(self, observed: Observation) -> Tensor:
        assert observed.probed is not None, "the engine probes before it asks"
        return observed.probed[..., self.sinks : -self.window]

    def model_budgets(self, counts: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        if self.budgets == "model":
            return super().model_budgets(counts, scores)
        floor = 1.0 if self.budgets == "even" else self.head_floor
        return [self.layer_budgets(count, of_layer, floor) for of_layer, count in zip(scores, counts, strict=True)]
