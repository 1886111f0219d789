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
from fastkv.cache.storage import KVStorage
from fastkv.engine.attention import AUTO, attend_from, causal_attention, take_rows
from fastkv.engine.tsp import TokenState
from fastkv.engine.workspace import Workspace
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
def prefill(
    model: Llama, ids: Tensor, policy: Policy, cache: KVCache, workspace: Workspace, attention: str = AUTO
) -> Prefill:
    """Run the prompts `ids`, int64 [B, N], through all layers under `policy`, into the empty `cache`.

    attention: the backend of causal attention.

    Full K/V of one layer at a time is there, in the `workspace`: a layer keeps its share in the cache, and the next
    one writes over the rest.
    """
    plans = plan_layers(policy, model.config.n_layers, ids.shape[1])
    run = LayerRun(model, policy, cache, workspace, attention)
    model.reserve(cache.prompt_tokens + cache.max_tokens)
    hidden = workspace.take("hidden", (*ids.shape, model.config.hidden_size), like=model.embed_tokens.weight)
    state = TokenState.start(ids, model.embed(ids, out=hidden))
    rope = model.rope_of_first(ids.shape[1])
    tokens: list[Tensor] = []
    kept: list[Tensor] = []
    for layer, plan in enumerate(plans):
        tokens.append(state.positions)
        state, rope, positions = run.layer(layer, plan, state, rope)
        kept.append(positions)
    return Prefill(model.head(state.hidden[:, -1]), tokens, kept, cache)


def new_cache(
    model: Llama, policy: Policy, ids: Tensor, max_tokens: int, position_limit: int, storage: KVStorage | None = None
) -> KVCache:
    """An empty cache for what `policy` keeps of the prompts `ids`, int64 [B, N], and `max_tokens` more.

    Its memory is in `storage`, for B texts, or its own (None) for as long as somebody holds it.
    """
    config, (batch, n_tokens) = model.config, ids.shape
    return KVCache(
        [plan.kept for plan in plan_layers(policy, config.n_layers, n_tokens)],
        max_tokens,
        batch=batch,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        position=n_tokens,
        position_limit=position_limit,
        dtype=model.dtype,
        device=model.device,
        storage=storage,
    )


@dataclass
class LayerRun:
    """The prefill of one request, layer by layer."""

    model: Llama
    policy: Policy
    cache: KVCache
    workspace: Workspace
    attention: str
    idle_hidden: str = "hidden, too"  # of the two buffers for hidden states, the one that is not in use

    def layer(self, layer: int, plan: LayerPlan, state: TokenState, rope: Rope) -> tuple[TokenState, Rope, Tensor]:
        """Keys, selection, then attention and MLP of the tokens that go on.

        Returns those tokens, their rotation, and the positions that the cache keeps.
        """
        last = layer == self.model.config.n_layers - 1
        if last or (plan.propagated is not None and _narrow_pays(self.model.device)):
            return self._narrow(layer, plan, state, rope)
        block = self.model.blocks[layer]
        observed = self._project(layer, state.hidden, rope)
        positions, rows = self.select(plan, state, observed)
        window = self.model.config.window_of(layer)
        attended = causal_attention(observed.q, observed.k, observed.v, window, self.attention)
        if rows is not None:
            state, attended = self._take(state, rows), take_rows(attended, rows)
            rope = self.model.rope(state.positions)
        return state.with_hidden(_finish(block, state.hidden, attended)), rope, positions

    def _narrow(self, layer: int, plan: LayerPlan, state: TokenState, rope: Rope) -> tuple[TokenState, Rope, Tensor]:
        """The same for a layer that fewer tokens leave than enter: no queries, attention and MLP of the others."""
        block = self.model.blocks[layer]
        observed = self._project_keys(layer, state.hidden, rope)
        positions, rows = self.select(plan, state, observed)
        if rows is None or layer == self.model.config.n_layers - 1:
            rows = state.last_row()
        state = self._take(state, rows)
        rope = self.model.rope(state.positions)
        q = block.project_q(state.hidden, rope)
        attended = attend_from(rows, q, observed.k, observed.v, self.model.config.window_of(layer))
        return state.with_hidden(_finish(block, state.hidden, attended)), rope, positions

    def _take(self, state: TokenState, rows: Tensor) -> TokenState:
        """The tokens that go on, moved into the other buffer."""
        out = self.workspace.take(self.idle_hidden, (*rows.shape, state.hidden.shape[-1]), like=state.hidden)
        self.idle_hidden = "hidden" if self.idle_hidden == "hidden, too" else "hidden, too"
        return state.take(rows, out)

    def select(self, plan: LayerPlan, state: TokenState, observed: Observation) -> tuple[Tensor, Tensor | None]:
        """Let the policy vote, and fill the layer's cache.

        Returns the positions kept, int64 [B, Hkv, n], and the rows of the tokens that go on, int64 [B, n] (None: all).
        """
        drops = plan.kept < plan.seen
        scores = self.policy.score(observed) if drops or plan.propagated is not None else None
        entries = select_entries(scores, plan.kept, self.policy.window) if scores is not None and drops else None
        self.cache.load(observed.layer, observed.k, observed.v, entries)
        every_head = state.positions.unsqueeze(1).expand(-1, observed.k.shape[1], -1)
        positions = every_head if entries is None else every_head.gather(2, entries)
        if scores is None or plan.propagated is None:
            return positions, None
        return positions, select_tokens(scores, plan.propagated, self.policy.window)

    def _project(self, layer: int, hidden: Tensor, rope: Rope) -> Observation:
        """q, k and v of all tokens, in chunks."""
        block = self.model.blocks[layer]
        heads = self._room_for_heads(hidden, sum(block.self_attn.heads))
        for start, end in _chunks(hidden):
            block.project(hidden[:, start:end], rope.at(start, end), out=heads[:, :, start:end])
        return Observation(layer, *heads.split(block.self_attn.heads, dim=1))

    def _project_keys(self, layer: int, hidden: Tensor, rope: Rope) -> Observation:
        """k and v of all tokens, in chunks, and q of those that the policy looks at."""
        block = self.model.blocks[layer]
        heads = self._room_for_heads(hidden, sum(block.self_attn.heads[1:]))
        for start, end in _chunks(hidden):
            block.project_kv(hidden[:, start:end], rope.at(start, end), out=heads[:, :, start:end])
        n_tokens = hidden.shape[1]
        first = 0 if self.policy.needs_all_queries else max(0, n_tokens - self.policy.window)
        q = block.project_q(hidden[:, first:], rope.at(first, n_tokens))
        return Observation(layer, q, *heads.chunk(2, dim=1))

    def _room_for_heads(self, hidden: Tensor, heads: int) -> Tensor:
        """[B, heads, T, D]."""
        shape = (hidden.shape[0], heads, hidden.shape[1], self.model.config.head_dim)
        return self.workspace.take("heads", shape, like=hidden)


def _narrow_pays(device: torch.device) -> bool:
    """Whether attention of the survivors alone, which needs a mask, is faster than that of all tokens, which does not.

    Measured on a CPU (benchmarks/choices.py). On a GPU not measured: masked attention over grouped heads may leave the
    fast kernels there.
    """
    return device.type == "cpu"


def _finish(block: Block, hidden: Tensor, attended: Tensor) -> Tensor:
    """Output projection and MLP, chunk by chunk and in place: hidden [B, T, E] is ours."""
    for start, end in _chunks(hidden):
        block.finish_(hidden[:, start:end], attended[:, :, start:end])
    return hidden


def _chunks(hidden: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk of the tokens."""
    n_tokens = hidden.shape[1]
    return ((start, min(start + CHUNK, n_tokens)) for start in range(0, n_tokens, CHUNK))
