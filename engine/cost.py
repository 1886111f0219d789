"""The cost model: what a prefill must compute and a decode step must read. Counts, not times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import LayerPlan, Policy, plan_layers
from fastkv.models.config import ModelConfig


def layer_weights(config: ModelConfig) -> tuple[int, int, int]:
    """Values in the matrices of one layer: (k and v; q and o; MLP)."""
    keys = 2 * config.n_kv_heads * config.head_dim * config.hidden_size
    queries = 2 * config.n_heads * config.head_dim * config.hidden_size
    return keys, queries, 3 * config.hidden_size * config.intermediate_size


class Work(NamedTuple):
    """Operations, a multiply-add being two of them: of products with weights, and of attention."""

    products: float
    attention: float


def prefill_work(config: ModelConfig, plans: Sequence[LayerPlan], batch: int = 1) -> Work:
    """Operations that a prefill of `batch` prompts cannot avoid.

    K and V for every token that a layer sees; queries, attention, output and MLP for every token that leaves it, which
    is one token at the last layer. A token attends to half of what the layer saw, on average over the tokens. Sliding
    windows, which spare some of that, are not looked at.
    """
    keys, queries, mlp = layer_weights(config)
    products, attention = 2.0 * config.vocab_size * config.hidden_size, 0.0
    for layer, plan in enumerate(plans):
        last = layer == len(plans) - 1
        attended = plan.seen if last else plan.seen / 2
        products += 2.0 * plan.seen * keys + 2.0 * leaving(plans, layer) * (queries + mlp)
        attention += 4.0 * leaving(plans, layer) * attended * config.n_heads * config.head_dim
    return Work(batch * products, batch * attention)


def leaving(plans: Sequence[LayerPlan], layer: int) -> int:
    """Tokens of a prompt whose attention and MLP a layer computes."""
    return 1 if layer == len(plans) - 1 else plans[layer].propagated or plans[layer].seen


def prefill_flops(config: ModelConfig, plans: Sequence[LayerPlan], batch: int = 1) -> float:
    """All of `prefill_work`."""
    return sum(prefill_work(config, plans, batch))


def first_pass_work(config: ModelConfig, layer: int, n_tokens: int, batch: int = 1) -> Work:
    """What choosing tokens adds (Policy.first_pass): all layers in front of `layer`, and its keys for every token."""
    keys, queries, mlp = layer_weights(config)
    attention = 2.0 * n_tokens * config.n_heads * config.head_dim
    tokens = batch * n_tokens
    return Work(tokens * (layer * 2.0 * (keys + queries + mlp) + 2.0 * keys), tokens * layer * attention)


def first_pass_flops(config: ModelConfig, layer: int, n_tokens: int, batch: int = 1) -> float:
    """All of `first_pass_work`."""
    return sum(first_pass_work(config, layer, n_tokens, batch))


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
