"""The cost model: what a prefill must compute and a decode step must read. Counts, not times."""

from __future__ import annotations

from collections.abc import Sequence

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import LayerPlan, Policy, plan_layers
from fastkv.models.config import ModelConfig


def layer_weights(config: ModelConfig) -> tuple[int, int, int]:
    """Values in the matrices of one layer: (k and v; q and o; MLP)."""
    keys = 2 * config.n_kv_heads * config.head_dim * config.hidden_size
    queries = 2 * config.n_heads * config.head_dim * config.hidden_size
    return keys, queries, 3 * config.hidden_size * config.intermediate_size


def prefill_flops(config: ModelConfig, plans: Sequence[LayerPlan], batch: int = 1) -> float:
    """Operations that a prefill of `batch` prompts cannot avoid, a multiply-add being two of them.

    K and V for every token that a layer sees; queries, attention, output and MLP for every token that leaves it, which
    is one token at the last layer. A token attends to half of what the layer saw, on average over the tokens. Sliding
    windows, which spare some of that, are not looked at.
    """
    keys, queries, mlp = layer_weights(config)
    total = 2.0 * config.vocab_size * config.hidden_size
    for layer, plan in enumerate(plans):
        last = layer == len(plans) - 1
        leaving = 1 if last else plan.propagated or plan.seen
        attended = plan.seen if last else plan.seen / 2
        total += 2.0 * plan.seen * keys + 2.0 * leaving * (queries + mlp)
        total += 4.0 * leaving * attended * config.n_heads * config.head_dim
    return batch * total


def first_pass_flops(config: ModelConfig, layer: int, n_tokens: int, batch: int = 1) -> float:
    """What choosing tokens adds (Policy.first_pass): all layers in front of `layer`, and its keys for every token."""
    keys, queries, mlp = layer_weights(config)
    attention = 2.0 * n_tokens * config.n_heads * config.head_dim
    return batch * n_tokens * (layer * (2.0 * (keys + queries + mlp) + attention) + 2.0 * keys)


def decode_bytes(
    config: ModelConfig, plans: Sequence[LayerPlan], new_tokens: float, itemsize: int, batch: int = 1
) -> float:
    """Bytes that one decode step of `batch` texts reads when `new_tokens` have been appended to each.

    All matrices once, whatever the batch is, and the live cache of every text, sliding windows not looked at.
    """
    weights = config.n_layers * sum(layer_weights(config)) + config.vocab_size * config.hidden_size
    entries = batch * sum(plan.kept + new_tokens for plan in plans)
    return itemsize * (weights + 2 * entries * config.n_kv_heads * config.head_dim)


def prefill_share(config: ModelConfig, policy: Policy, lengths: Sequence[int]) -> float:
    """The operations of prefills of these lengths under `policy`, counted, as a share of those with everything kept."""

    def total(one: Policy) -> float:
        return sum(prefill_flops(config, plan_layers(one, config.n_layers, n)) for n in lengths)

    return total(policy) / total(FullKV())
