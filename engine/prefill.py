"""Prefill: THE layer loop. Stages of layers, each layer's KV selection, and the TSP transition between stages.

A layer first computes K and V of all its tokens, from them its votes, and from these what stays in the cache and which
tokens go on. Only for the latter does it then compute queries, attention and MLP: a token whose state nobody will read
costs no more than its key and value. That holds for the TSP layer and for the last one, which only the last token
leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import LayerPlan, Observation, Policy, plan_layers
from fastkv.cache.selection import select_entries, select_tokens
from fastkv.engine.attention import attend_from, causal_attention, take_rows
from fastkv.engine.tsp import TokenState
from fastkv.models.layers import Rope
from fastkv.models.llama import Block, Llama

# Tokens that projections and MLP work on at a time: the widest activation is a chunk's, not the prompt's.
CHUNK = 4096


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
        state, rope, positions = _run_layer(model, layer, plan, state, rope, policy, cache)
        kept.append(positions)
    return Prefill(model.head(state.hidden[:, -1]), tokens, kept, cache)


def _run_layer(
    model: Llama, layer: int, plan: LayerPlan, state: TokenState, rope: Rope, policy: Policy, cache: KVCache
) -> tuple[TokenState, Rope, Tensor]:
    """Keys, selection, then attention and MLP of the tokens that go on.

    Returns those tokens, their rotation, and the positions that the cache keeps.
    """
    block = model.blocks[layer]
    last = layer == model.config.n_layers - 1
    if last or (plan.propagated is not None and _narrow_pays(model.device)):
        return _run_narrow(model, layer, plan, state, rope, policy, cache)
    observed = _project(block, layer, state.hidden, rope)
    positions, rows = _select(plan, state, observed, policy, cache)
    attended = causal_attention(observed.q, observed.k, observed.v, model.config.window_of(layer))
    del observed  # this layer's full K/V goes before its MLP needs the memory
    if rows is not None:
        state, attended = state.take(rows), take_rows(attended, rows)
        rope = model.rope(state.positions)
    return state.with_hidden(_finish(block, state.hidden, attended)), rope, positions


def _narrow_pays(device: torch.device) -> bool:
    """Whether attention of the survivors alone, which needs a mask, is faster than that of all tokens, which does not.

    Measured on a CPU (benchmarks/choices.py). On a GPU not measured: masked attention over grouped heads may leave the
    fast kernels there.
    """
    return device.type == "cpu"


def _run_narrow(
    model: Llama, layer: int, plan: LayerPlan, state: TokenState, rope: Rope, policy: Policy, cache: KVCache
) -> tuple[TokenState, Rope, Tensor]:
    """The same for a layer that fewer tokens leave than enter: no queries, attention and MLP of the others."""
    block = model.blocks[layer]
    observed = _project_keys(block, layer, state.hidden, rope, policy.window)
    positions, rows = _select(plan, state, observed, policy, cache)
    if rows is None or layer == model.config.n_layers - 1:
        rows = state.last_row()
    state = state.take(rows)
    rope = model.rope(state.positions)
    q = block.project_q(state.hidden, rope)
    attended = attend_from(rows, q, observed.k, observed.v, model.config.window_of(layer))
    del observed
    return state.with_hidden(_finish(block, state.hidden, attended)), rope, positions


def _select(
    plan: LayerPlan, state: TokenState, observed: Observation, policy: Policy, cache: KVCache
) -> tuple[Tensor, Tensor | None]:
    """Let the policy vote, and fill the layer's cache.

    Returns the positions kept, int64 [B, Hkv, n], and the rows of the tokens that go on, int64 [B, n] (None: all).
    """
    drops = plan.kept < plan.seen
    scores = policy.score(observed) if drops or plan.propagated is not None else None
    entries = select_entries(scores, plan.kept, policy.window) if scores is not None and drops else None
    cache.load(observed.layer, observed.k, observed.v, entries)
    every_head = state.positions.unsqueeze(1).expand(-1, observed.k.shape[1], -1)
    positions = every_head if entries is None else every_head.gather(2, entries)
    if scores is None or plan.propagated is None:
        return positions, None
    return positions, select_tokens(scores, plan.propagated, policy.window)


def _project(block: Block, layer: int, hidden: Tensor, rope: Rope) -> Observation:
    """q, k and v of all tokens, in chunks."""
    if hidden.shape[1] <= CHUNK:
        return Observation(layer, *block.project(hidden, rope))
    q, k, v = (_empty_heads(block, hidden, heads) for heads in block.self_attn.heads)
    for start, end in _chunks(hidden):
        q[:, :, start:end], k[:, :, start:end], v[:, :, start:end] = block.project(
            hidden[:, start:end], rope.at(start, end)
        )
    return Observation(layer, q, k, v)


def _project_keys(block: Block, layer: int, hidden: Tensor, rope: Rope, window: int) -> Observation:
    """k and v of all tokens, in chunks, and q of the last `window` alone."""
    k, v = (_empty_heads(block, hidden, heads) for heads in block.self_attn.heads[1:])
    for start, end in _chunks(hidden):
        k[:, :, start:end], v[:, :, start:end] = block.project_kv(hidden[:, start:end], rope.at(start, end))
    n_tokens = hidden.shape[1]
    first = max(0, n_tokens - window)
    return Observation(layer, block.project_q(hidden[:, first:], rope.at(first, n_tokens)), k, v)


def _finish(block: Block, hidden: Tensor, attended: Tensor) -> Tensor:
    """Output projection and MLP, chunk by chunk and in place: hidden [B, T, E] is ours."""
    for start, end in _chunks(hidden):
        block.finish_(hidden[:, start:end], attended[:, :, start:end])
    return hidden


def _chunks(hidden: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk of the tokens."""
    n_tokens = hidden.shape[1]
    return ((start, min(start + CHUNK, n_tokens)) for start in range(0, n_tokens, CHUNK))


def _empty_heads(block: Block, hidden: Tensor, heads: int) -> Tensor:
    """Room for q, k or v of all tokens: [B, heads, T, D]."""
    return hidden.new_empty(hidden.shape[0], heads, hidden.shape[1], block.self_attn.head_dim)
