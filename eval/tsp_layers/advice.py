"""Which TSP layers and rates are worth trying, and in which order. The rule stands in RULE, which is printed too.

Nothing in it is tuned to a model. The line between settled and not settled is half way between the worst and the best
layer of this very model, so that it does not matter how much of all attention rests on the same few tokens in every
layer, which lifts all layers alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastkv.cache.policies import FastKV, FullKV
from fastkv.engine.cost import prefill_share
from fastkv.eval.tsp_layers.check import Check, Result
from fastkv.eval.tsp_layers.importance import Importance
from fastkv.models.config import ModelConfig

RULE = """\
Rule: importance has settled, at a rate, in the layers around the best one (by attained share) that come, without a gap
between them and it, at least half way from the worst layer's share to the best one's.
Settled layers are tried at every rate above kv_retention (with fewer tokens the heads of the later layers would have no
choice of their own left), those that leave the prefill the least work first. The first one that passes the check is the
advice. It passes if its scores over all prompts are no lower than the default's, and nowhere clearly lower. One with
more work than the default must be clearly higher, and is tried only where the full cache is. Clearly: the whole 95 %
confidence interval of the difference, over the same prompts, is on one side of zero.
"""


@dataclass(frozen=True)
class Setting:
    """A TSP layer and rate. work: a prefill's operations as a share of those with everything kept."""

    layer: int
    rate: float
    work: float
    policy: FastKV

    @property
    def label(self) -> str:
        return f"layer {self.layer}, rate {self.rate:g}"


def setting(base: FastKV, layer: int, rate: float, config: ModelConfig, lengths: Sequence[int]) -> Setting:
    """`base` with this TSP layer and rate; its work is that of prompts of these lengths."""
    policy = replace(base, tsp_layer=layer, tsp_rate=rate)
    return Setting(layer, rate, prefill_share(config, policy, lengths), policy)


def default_setting(base: FastKV, config: ModelConfig, lengths: Sequence[int]) -> Setting:
    """What `base` does by itself."""
    assert not isinstance(base.tsp_rate, tuple), "one stage: several are refused before"
    return setting(base, base.tsp_layer_of(config.n_layers), base.tsp_rate, config, lengths)


def settled_layers(attained: Sequence[float]) -> list[int]:
    """The run of layers around the best one whose share is at least half way from the worst to the best.

    A layer that does well by itself, with worse ones between it and the best, is not where importance settles.
    """
    middle = (min(attained) + max(attained)) / 2
    first = last = max(range(len(attained)), key=lambda layer: attained[layer])
    while first > 0 and attained[first - 1] >= middle:
        first -= 1
    while last + 1 < len(attained) and attained[last + 1] >= middle:
        last += 1
    return list(range(first, last + 1))


def highest_void_rate(base: FastKV) -> float:
    """Up to this rate no more tokens are propagated than each head may keep: nothing would be left to choose.

    Where heads choose nothing anyway, or their budget is no rate, there is none.
    """
    return 0.0 if base.kv_retention == 1 or base.kv_len is not None else base.kv_retention


def candidates(importance: Importance, base: FastKV, config: ModelConfig, lengths: Sequence[int]) -> list[Setting]:
    """The settings worth trying, the least work first; of settings with the same work, the higher rate first."""
    found = [
        setting(base, layer, rate, config, lengths)
        for rate, attained in zip(importance.rates, importance.attained.tolist(), strict=True)
        if rate > highest_void_rate(base)
        for layer in settled_layers(attained)
    ]
    return sorted(found, key=lambda one: (one.work, -one.rate, one.layer))


@dataclass(frozen=True)
class Checked:
    """A setting that was run; `verdict` says in words what came of it."""

    setting: Setting
    result: Result
    verdict: str


@dataclass(frozen=True)
class Findings:
    """What was run, the default first, and what is advised: the last one, or the default where none passed."""

    full: Result
    checked: list[Checked]
    advice: Setting

    @property
    def found(self) -> bool:
        """Whether the advice is something else than the default."""
        return self.advice is not self.checked[0].setting


def search(check: Check, default: Setting, candidates: Iterable[Setting]) -> Findings:
    """Check `candidates` in order, by the RULE; the default itself needs no check against itself."""
    full = check.run("full cache", FullKV())
    reference = check.run(f"default ({default.label})", default.policy)
    clearly_lower = full.clearly_higher(reference)
    checked = [Checked(default, reference, "the default" + ", clearly lower than the full cache" * clearly_lower)]
    for one in candidates:
        if (one.layer, one.rate) == (default.layer, default.rate):
            continue
        dearer = one.work >= default.work
        if dearer and not clearly_lower:
            continue
        result = check.run(one.label, one.policy, reference)
        verdict, worse = "advised", result.worse_than(reference)
        if worse is not None:
            verdict = f"worse than the default: {worse}"
        elif dearer and not result.clearly_higher(reference):
            verdict = "more work, and not clearly higher than the default"
        checked.append(Checked(one, result, verdict))
        if verdict == "advised":
            return Findings(full, checked, one)
    return Findings(full, checked, default)
