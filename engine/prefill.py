"""Prefill: THE layer loop. Stages of layers, each layer's KV selection, and the TSP transition between stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import LayerPlan, Observation, Policy, plan_layers
from fastkv.cache.selection import select_entries, select_tokens
from fastkv.engine.attention import causal_attention
from fastkv.engine.tsp import TokenState
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama


@dataclass(frozen=True)
class Prefill:
    """What a prefill leaves behind.

    logits: float32 [B, V], of the last token.
    tokens: for each layer int64 [B, T], the original positions of what its keys saw (the TSP layer: all N).
    kept: for each layer int64 [B, Hkv, n], the original positions of the entries in its cache, ascending.
    cache: holds those entries, with room for `max_tokens` more.
    """

    logits: Tensor
    tokens: list[Tensor]
    kept: list[Tensor]
    cache: KVCache


@torch.inference_mode()
def prefill(model: Llama, ids: Tensor, policy: Policy, max_tokens: int, position_limit: int) -> Prefill:
    """Run the prompts `ids`, int64 [B, N], through all layers under `policy`.

    Full K/V of one layer at a time is alive: a layer keeps its share in the cache and lets the rest go.
    """
    config = model.config
    plans = plan_layers(policy, config.n_layers, ids.shape[1])
    cache = KVCache(
        [plan.kept for plan in plans],
        max_tokens,
        batch=ids.shape[0],
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        position=ids.shape[1],
        position_limit=position_limit,
        dtype=model.dtype,
        device=model.device,
    )
    state = TokenState.start(ids, model.embed(ids))
    rope = model.rope(state.positions)
    tokens: list[Tensor] = []
    kept: list[Tensor] = []
    for layer, plan in enumerate(plans):
        tokens.append(state.positions)
        state, positions = _run_layer(model, layer, plan, state, rope, policy, cache)
        kept.append(positions)
        if plan.propagated is not None:
            rope = model.rope(state.positions)
    return Prefill(model.head(state.hidden[:, -1]), tokens, kept, cache)


def _run_layer(
    model: Llama, layer: int, plan: LayerPlan, state: TokenState, rope: Rope, policy: Policy, cache: KVCache
) -> tuple[TokenState, Tensor]:
    """Attention, selection, MLP. Returns the tokens that go on and the positions that the cache keeps."""
    block = model.blocks[layer]
    hidden, observed = _attention(model, layer, state.hidden, rope)
    state = state.with_hidden(hidden)
    drops = plan.kept < plan.seen
    scores = policy.score(observed) if drops or plan.propagated is not None else None
    entries = select_entries(scores, plan.kept, policy.window) if scores is not None and drops else None
    cache.load(layer, observed.k, observed.v, entries)
    del observed  # this layer's full K/V goes before its MLP needs the memory
    positions = _kept_positions(state.positions, entries, cache.k[layer].shape[1])
    # Tokens are dropped before the MLP: it works on each token alone, so what it would do for the dropped is lost.
    if scores is not None and plan.propagated is not None:
        state = state.take(select_tokens(scores, plan.propagated, policy.window))
    if layer == model.config.n_layers - 1:
        state = state.take_last()
    return state.with_hidden(block.mlp(state.hidden)), positions


def _attention(model: Llama, layer: int, hidden: Tensor, rope: Rope) -> tuple[Tensor, Observation]:
    """One layer's causal attention, and what a policy may see of it."""
    seen: list[Observation] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(Observation(layer, q, k, v))
        return causal_attention(q, k, v, model.config.window_of(layer))

    hidden = model.blocks[layer].attention(hidden, rope, attend)
    return hidden, seen.pop()


def _kept_positions(positions: Tensor, entries: Tensor | None, n_kv_heads: int) -> Tensor:
    """positions [B, T] of what the layer saw -> [B, Hkv, n] of what it keeps."""
    every_head = positions.unsqueeze(1).expand(-1, n_kv_heads, -1)
    return every_head if entries is None else every_head.gather(2, entries)
