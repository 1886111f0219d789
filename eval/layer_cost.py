"""How much a prefill computes under a policy: a count of operations, not a time."""

from __future__ import annotations

from collections.abc import Sequence

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import LayerPlan, Policy, plan_layers
from fastkv.models.config import ModelConfig


def prefill_share(config: ModelConfig, policy: Policy, lengths: Sequence[int]) -> float:
    """The operations of prefills of these lengths under `policy`, as a share of those with everything kept."""

    def total(one: Policy) -> float:
        return sum(prefill_operations(config, plan_layers(one, config.n_layers, n)) for n in lengths)

    return total(policy) / total(FullKV())


def prefill_operations(config: ModelConfig, plans: Sequence[LayerPlan]) -> float:
    """Multiplications and additions of one prefill.

    K and V for every token that a layer sees; queries, attention, output and MLP for every token that leaves it, one at
    the last layer. Over the tokens of a causal layer, a query meets half of the keys on average.
    """
    e, d = config.hidden_size, config.head_dim
    kv = 2 * config.n_kv_heads * d * e
    rest = 2 * config.n_heads * d * e + 3 * e * config.intermediate_size
    total = 2.0 * config.vocab_size * e
    for number, plan in enumerate(plans, start=1):
        last = number == len(plans)
        leaving = 1 if last else plan.propagated or plan.seen
        met = plan.seen if last else plan.seen / 2
        total += 2.0 * (plan.seen * kv + leaving * rest) + 4.0 * leaving * met * config.n_heads * d
    return total
