"""How much a prefill computes under a policy: a count of operations, not a time."""

from __future__ import annotations

from collections.abc import Sequence

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import Policy, plan_layers
from fastkv.engine.cost import prefill_flops
from fastkv.models.config import ModelConfig


def prefill_share(config: ModelConfig, policy: Policy, lengths: Sequence[int]) -> float:
    """The operations of prefills of these lengths under `policy`, as a share of those with everything kept."""

    def total(one: Policy) -> float:
        return sum(prefill_flops(config, plan_layers(one, config.n_layers, n)) for n in lengths)

    return total(policy) / total(FullKV())
