"""What a policy decides: which tokens go on to later layers, how many entries a layer keeps, and how they rank.

The two decisions of FastKV are two methods that never look at each other: `stages` reduces the context (prefill
compute), `budget` the cache (decode memory). Both count from the original prompt length.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A slab of layers that share one token set; `keep` tokens go on behind its last layer (None: all of them)."""

    layers: range
    keep: int | None = None


@dataclass(frozen=True)
class Observation:
    """What a policy sees of a layer's prefill.

    k and v: [B, Hkv, T, D] over the T tokens that the layer saw, in their order; q: [B, Hq, n, D] of the last n of
    them, at least the policy's window, or of all if it needs them. q and k are rotated.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor


class Policy:
    """Base of every method. This one keeps everything; a method overrides what it decides otherwise."""

    name: ClassVar[str]
    window: int = 0  # the last tokens, which are kept whatever the scores say
    needs_all_queries: ClassVar[bool] = False  # of a layer, for its scores; not those of the window alone

    def validate(self, n_layers: int) -> None:
        """Raise FastKVError if a setting does not fit a model of `n_layers`."""

    def settings(self, n_layers: int) -> dict[str, Any]:
        """The settings by name, with defaults that depend on the model worked out."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        """Context reduction: the slabs, in order, that together are all layers."""
        return [Stage(range(n_layers))]

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        """KV compression: entries per KV head that `layer` keeps of a prompt of `n_tokens`, its window included."""
        return n_tokens

    def score(self, observed: Observation) -> Tensor:
        """float32 [B, Hkv, T - window]: how much each token in front of the window matters to each KV head."""
        raise NotImplementedError(f"{type(self).__name__} drops tokens, so it must score them")


@dataclass(frozen=True)
class LayerPlan:
    """How many tokens a layer sees in the prefill, keeps in its cache, and sends on (None: all it saw)."""

    seen: int
    kept: int
    propagated: int | None


def plan_layers(policy: Policy, n_layers: int, n_tokens: int) -> list[LayerPlan]:
    """What `policy` will do with a prompt of `n_tokens`, layer by layer: the sizes, before anything is computed."""
    plans: list[LayerPlan] = []
    seen = n_tokens
    for stage in policy.stages(n_layers, n_tokens):
        reduces = stage.keep is not None and stage.keep < seen
        for layer in stage.layers:
            kept = min(policy.budget(layer, n_layers, n_tokens), seen)
            propagated = stage.keep if reduces and layer == stage.layers[-1] else None
            plans.append(LayerPlan(seen, kept, propagated))
        if reduces and stage.keep is not None:
            seen = stage.keep
    return plans


def drops_tokens(plans: list[LayerPlan]) -> bool:
    """Whether any layer forgets any token of the prompt."""
    return any(plan.kept < plans[0].seen for plan in plans)
