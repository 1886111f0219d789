"""What a policy decides: which tokens go on to later layers, how many entries a layer keeps, and how they rank.

The two decisions of FastKV are two methods that never look at each other: `stages` reduces the context (prefill
compute), `budget` the cache (decode memory). Both count from the original prompt length.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A slab of layers that share one token set; `keep` tokens go on behind its last layer (None: all of them)."""

    layers: range
    keep: int | None = None


@dataclass(frozen=True)
class FirstPass:
    """A pass that only chooses: the `keep` tokens that `layer` scores best are what the model then reads anew.

    They are read as a text of their own, at positions 0 … keep - 1.
    """

    layer: int
    keep: int


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
    n_past: int = 0


class OnlineSelector(Protocol):
    """Follows the layers of one prefill, and says behind which of them tokens are dropped."""

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        """scores: float32 [B, Hkv, T - window] of `layer`, which all tokens have reached.

        None lets all of them go on. Else the votes, float32 [B, H, T - window] for some H, by whose sum over H the
        first stage's `keep` tokens are chosen; then nothing more is asked. At that stage's last layer it must be votes.
        """


class Policy:
    """Base of every method. This one keeps everything; a method overrides what it decides otherwise."""

    name: ClassVar[str]
    window: int = 0  # the last tokens, which are kept whatever the scores say
    needs_all_queries: ClassVar[bool] = False  # of a layer, for its scores; not those of the window alone
    per_head: ClassVar[bool] = False
    compresses_again: ClassVar[bool] = False
    layout: ClassVar[Any] = None  # the KV heads of a layer keep different numbers of entries (`head_budgets`)

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        """Raise FastKVError if a setting does not fit a model of `n_layers` and `n_kv_heads` (None: not checked)."""

    def settings(self, n_layers: int) -> dict[str, Any]:
        """The settings by name, with defaults that depend on the model worked out."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        """Context reduction: the slabs, in order, that together are all layers.

        With a `watch`, two slabs that meet where tokens are dropped at the latest.
        """
        return [Stage(range(n_layers))]

    def online_selector(self, n_layers: int, n_tokens: int) -> OnlineSelector | None:
        """Whoever decides during a prefill where tokens are dropped; None: `stages` has said it."""
        return None

    def first_pass(self, n_layers: int, n_tokens: int) -> FirstPass | None:
        """Context reduction before the actual prefill, whose `stages` then count from what is left."""
        return None

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        """KV compression: entries per KV head that `layer` keeps of a prompt of `n_tokens`, its window included.

        Where the policy is ragged, the mean over the heads.
        """
        return n_tokens

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        """int64 [B, Hkv]: entries that each KV head keeps, its window included; together Hkv * count.

        count: the layer's budget, less than the T tokens that it saw. scores: its own. Asked of a ragged policy only.
        """
        raise NotImplementedError(f"{type(self).__name__} gives every head the same")

    def score(self, observed: Observation) -> Tensor:
        """float32 [B, Hkv, T - window]: how much each token in front of the window matters to each KV head."""
        raise NotImplementedError(f"{type(self).__name__} drops tokens, so it must score them")


@dataclass(frozen=True)
class LayerPlan:
    """How many tokens a layer sees in the prefill, keeps in its cache, and sends on (None: all it saw).

    Under a policy with a `watch` these are upper bounds: tokens may be dropped at an earlier layer.
    """

    seen: int
    kept: int
    propagated: int | None


def plan_layers(policy: Policy, n_layers: int, n_tokens: int) -> list[LayerPlan]:
    """What `policy` will do with a prompt of `n_tokens`, layer by layer: the sizes, before anything is computed."""
    plans: list[LayerPlan] = []
    first = policy.first_pass(n_layers, n_tokens)
    seen = n_tokens if first is None else first.keep
    for stage in policy.stages(n_layers, seen):
        reduces = stage.keep is not None and stage.keep < seen
        for layer in stage.layers:
            kept = min(policy.budget(layer, n_layers, n_tokens), seen)
            propagated = stage.keep if reduces and layer == stage.layers[-1] else None
            plans.append(LayerPlan(seen, kept, propagated))
        if reduces and stage.keep is not None:
            seen = stage.keep
    return plans


def drops_tokens(policy: Policy, n_layers: int, n_tokens: int) -> bool:
    """Whether any layer may forget any token of a prompt of `n_tokens`.

    A plan's numbers are upper bounds where the policy decides online, so a layer that reduces at all counts.
    """
    plans = plan_layers(policy, n_layers, n_tokens)
    return any(plan.kept < n_tokens or plan.propagated is not None for plan in plans)
