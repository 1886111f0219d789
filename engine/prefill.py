"""Prefill: THE layer loop. Stages of layers, each layer's KV selection, and the TSP transition between stages.

A layer first computes K and V of all its tokens, from them its votes, and from these what stays in the cache and which
tokens go on. Only for the latter does it then compute queries, attention and MLP: a token whose state nobody will read
costs no more than its key and value. That holds for the TSP layer and for the last one, which only the last token
leaves. A policy that decides during the prefill where tokens are dropped is asked at each layer
(Policy.online_selector); one that has the model read its choice anew runs the lower layers first, and keeps nothing of
that (Policy.first_pass).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import FirstPass, LayerPlan, Observation, OnlineSelector, Policy, drops_tokens, plan_layers
from fastkv.cache.ragged import RaggedEntries, RaggedKVCache, select_ragged
from fastkv.cache.selection import select_entries, select_tokens
from fastkv.cache.storage import KVStorage
from fastkv.engine.attention import AUTO, attend_from, causal_attention, take_rows
from fastkv.engine.tsp import TokenState
from fastkv.engine.workspace import Workspace
from fastkv.models.layers import Rope
from fastkv.models.linear import BLOCK
from fastkv.models.llama import Llama

# Tokens that projections and MLP work on at a time: the widest activation is a chunk's, not the prompt's.
CHUNK = 4096


@dataclass(frozen=True)
class Prefill:
    """What a prefill leaves behind.

    logits: float32 [B, V], of the last token.
    tokens: for each layer int64 [B, T], the original positions of what its keys saw (the TSP layer: all N).
    kept: for each layer int64 [B, Hkv, n], the original positions of the entries in its cache, ascending; where heads
    keep different numbers, -1 stands behind those of the shorter ones.
    cache: holds those entries, with room for `max_tokens` more.
    """

    logits: Tensor
    tokens: list[Tensor]
    kept: list[Tensor]
    cache: KVCache

    @property
    def layer_tokens(self) -> list[int]:
        """How many tokens each layer saw."""
        return [positions.shape[1] for positions in self.tokens]


@torch.inference_mode()
def prefill(
    model: Llama, ids: Tensor, policy: Policy, cache: KVCache, workspace: Workspace, attention: str = AUTO
) -> Prefill:
    """Run the prompts `ids`, int64 [B, N], through all layers under `policy`, into the empty `cache`.

    attention: the backend of causal attention.

    Full K/V of one layer at a time is there, in the `workspace`: a layer keeps its share in the cache, and the next
    one writes over the rest.
    """
    n_layers, n_tokens = model.config.n_layers, ids.shape[1]
    plans = plan_layers(policy, n_layers, n_tokens)
    run = LayerRun(model, policy, cache, workspace, attention)
    run.keep = next((plan.propagated for plan in plans if plan.propagated is not None), None)
    run.selector = policy.online_selector(n_layers, n_tokens) if run.keep is not None else None
    if run.selector is not None:
        plans = [replace(plan, propagated=None) for plan in plans]  # it says where tokens are dropped, and not the plan
    model.reserve(cache.prompt_tokens + cache.max_tokens)
    first = policy.first_pass(n_layers, n_tokens)
    origins = None if first is None else run.choose(ids, first)
    state, rope = run.start(ids if origins is None else ids.gather(1, origins))
    tokens: list[Tensor] = []
    kept: list[Tensor] = []
    for layer, plan in enumerate(plans):
        tokens.append(state.positions)
        state, rope, positions = run.layer(layer, plan, state, rope)
        kept.append(positions)
    if origins is not None:
        tokens = [origins.gather(1, positions) for positions in tokens]
        kept = [origins.unsqueeze(1).expand(-1, of.shape[1], -1).gather(2, of) for of in kept]
    return Prefill(model.head(state.hidden[:, -1]), tokens, kept, cache)


def new_cache(
    model: Llama, policy: Policy, ids: Tensor, max_tokens: int, position_limit: int, storage: KVStorage | None = None
) -> KVCache:
    """An empty cache for what `policy` keeps of the prompts `ids`, int64 [B, N], and `max_tokens` more.

    Its memory is in `storage`, for B texts, or its own (None) for as long as somebody holds it.
    """
    config, (batch, n_tokens) = model.config, ids.shape
    plans = plan_layers(policy, config.n_layers, n_tokens)
    ragged = policy.per_head and drops_tokens(policy, config.n_layers, n_tokens)
    return (RaggedKVCache if ragged else KVCache)(
        [plan.kept for plan in plans],
        max_tokens,
        batch=batch,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        position=plans[0].seen,
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
    selector: OnlineSelector | None = None  # decides where tokens are dropped; None, too, once that is decided
    keep: int | None = None  # how many tokens then go on
    idle_hidden: str = "hidden, too"  # of the two buffers for hidden states, the one that is not in use

    def start(self, ids: Tensor) -> tuple[TokenState, Rope]:
        """Embedding and rotation of texts that are read from their beginning: ids int64 [B, N]."""
        shape = (*ids.shape, self.model.config.hidden_size)
        hidden = self.workspace.take("hidden", shape, like=self.model.embed_tokens.weight)
        return TokenState.start(ids, self.model.embed(ids, out=hidden)), self.model.rope_of_first(ids.shape[1])

    def choose(self, ids: Tensor, first: FirstPass) -> Tensor:
        """The tokens that a first pass chooses of ids, int64 [B, N]: int64 [B, first.keep], ascending."""
        state, rope = self.start(ids)
        for layer in range(first.layer):
            observed = self._project(layer, state.hidden, rope)
            state = self._all_go_on(layer, state, observed)
        observed = self._project_keys(first.layer, state.hidden, rope)
        return select_tokens(self.policy.score(observed), first.keep, self.policy.window)

    def layer(self, layer: int, plan: LayerPlan, state: TokenState, rope: Rope) -> tuple[TokenState, Rope, Tensor]:
        """Keys, selection, then attention and MLP of the tokens that go on.

        Returns those tokens, their rotation, and the positions that the cache keeps.
        """
        last = layer == self.model.config.n_layers - 1
        may_drop = plan.propagated is not None or self.selector is not None
        if last or (may_drop and _narrow_pays(self.model.device)):
            return self._narrow(layer, plan, state, rope)
        observed = self._project(layer, state.hidden, rope)
        positions, rows = self.select(plan, state, observed)
        if rows is None:
            return self._all_go_on(layer, state, observed), rope, positions
        window = self.model.config.window_of(layer)
        attended = causal_attention(observed.q, observed.k, observed.v, window, self.attention)
        state, attended = self._take(state, rows), take_rows(attended, rows)
        return self._finished(layer, state, attended), self.model.rope(state.positions), positions

    def _narrow(self, layer: int, plan: LayerPlan, state: TokenState, rope: Rope) -> tuple[TokenState, Rope, Tensor]:
        """The same for a layer that fewer tokens leave than enter: no queries, attention and MLP of the others."""
        observed = self._project_keys(layer, state.hidden, rope)
        positions, rows = self.select(plan, state, observed)
        if layer == self.model.config.n_layers - 1:
            rows = state.last_row()
        if rows is None:  # the selector propagates all
            observed = replace(observed, q=self._project_queries(layer, state.hidden, rope))
            return self._all_go_on(layer, state, observed), rope, positions
        state = self._take(state, rows)
        rope = self.model.rope(state.positions)
        q = self.model.blocks[layer].project_q(state.hidden, rope)
        attended = attend_from(rows, q, observed.k, observed.v, self.model.config.window_of(layer))
        return self._finished(layer, state, attended), rope, positions

    def _all_go_on(self, layer: int, state: TokenState, observed: Observation) -> TokenState:
        """Attention and MLP of every token that the layer saw; q of all of them is in `observed`."""
        window = self.model.config.window_of(layer)
        return self._finished(
            layer, state, causal_attention(observed.q, observed.k, observed.v, window, self.attention)
        )

    def _finished(self, layer: int, state: TokenState, attended: Tensor) -> TokenState:
        """Output projection and MLP, chunk by chunk and in place: the hidden states [B, T, E] are ours."""
        for start, end in _chunks(state.hidden):
            self.model.blocks[layer].finish_(state.hidden[:, start:end], attended[:, :, start:end])
        return state

    def _take(self, state: TokenState, rows: Tensor) -> TokenState:
        """The tokens that go on, moved into the other buffer."""
        out = self.workspace.take(self.idle_hidden, (*rows.shape, state.hidden.shape[-1]), like=state.hidden)
        self.idle_hidden = "hidden" if self.idle_hidden == "hidden, too" else "hidden, too"
        return state.take(rows, out)

    def select(self, plan: LayerPlan, state: TokenState, observed: Observation) -> tuple[Tensor, Tensor | None]:
        """Let the policy vote, and fill the layer's cache.

        Returns the positions kept, int64 [B, Hkv, n], and the rows of the tokens that go on, int64 [B, n] (None: all).
        """
        count = min(plan.kept, observed.k.shape[2])
        drops = count < observed.k.shape[2]
        if not (drops or plan.propagated is not None or self.selector is not None):
            self.cache.load(observed.layer, observed.k, observed.v, None)
            return _of_every_head(state.positions, observed), None
        scores = self.policy.score(observed)
        entries = self._select_entries(observed.layer, scores, count) if drops else None
        self.cache.load(observed.layer, observed.k, observed.v, entries)
        rows = self._select_tokens(observed.layer, plan, scores)
        if isinstance(entries, RaggedEntries):
            return entries.positions(state.positions), rows
        every_head = _of_every_head(state.positions, observed)
        return every_head if entries is None else every_head.gather(2, entries), rows

    def _select_entries(self, layer: int, scores: Tensor, count: int) -> Tensor | RaggedEntries:
        if not self.policy.per_head:
            return select_entries(scores, count, self.policy.window)
        counts = self.policy.head_budgets(layer, self.model.config.n_layers, count, scores)
        return select_ragged(scores, counts, self.policy.window)

    def _select_tokens(self, layer: int, plan: LayerPlan, scores: Tensor) -> Tensor | None:
        """The rows of the tokens that go on behind this layer, int64 [B, n], or None: all of them."""
        votes, keep = (scores, plan.propagated) if self.selector is None else (self.selector(layer, scores), self.keep)
        if votes is None or keep is None:
            return None
        self.selector = None
        return select_tokens(votes, keep, self.policy.window)

    def _project(self, layer: int, hidden: Tensor, rope: Rope) -> Observation:
        """q, k and v of all tokens, in chunks."""
        block = self.model.blocks[layer]
        heads = self._room_for_heads(hidden, sum(block.self_attn.heads))
        for start, end in _chunks(hidden):
            block.project(hidden[:, start:end], rope.at(start, end), out=heads[:, :, start:end])
        q, k, v = heads.split(block.self_attn.heads, dim=1)
        return Observation(layer, q, k, v)

    def _project_keys(self, layer: int, hidden: Tensor, rope: Rope) -> Observation:
        """k and v of all tokens, in chunks, and q of those that the policy looks at."""
        block = self.model.blocks[layer]
        heads = self._room_for_heads(hidden, sum(block.self_attn.heads[1:]))
        for start, end in _chunks(hidden):
            block.project_kv(hidden[:, start:end], rope.at(start, end), out=heads[:, :, start:end])
        n_tokens = hidden.shape[1]
        first = 0 if self.policy.needs_all_queries else max(0, n_tokens - self.policy.window)
        q = block.project_q(hidden[:, first:], rope.at(first, n_tokens))
        k, v = heads.chunk(2, dim=1)
        return Observation(layer, q, k, v)

    def _project_queries(self, layer: int, hidden: Tensor, rope: Rope) -> Tensor:
        """q of all tokens, in chunks."""
        block = self.model.blocks[layer]
        config, shape = self.model.config, hidden.shape
        q = self.workspace.take("queries", (shape[0], config.n_heads, shape[1], config.head_dim), like=hidden)
        for start, end in _chunks(hidden):
            q[:, :, start:end] = block.project_q(hidden[:, start:end], rope.at(start, end))
        return q

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


def _of_every_head(positions: Tensor, observed: Observation) -> Tensor:
    """positions int64 [B, T] -> [B, Hkv, T]."""
    return positions.unsqueeze(1).expand(-1, observed.k.shape[1], -1)


def _chunks(hidden: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk of the tokens: CHUNK of them, then a multiple of BLOCK, then what is left.

    Multiples of BLOCK are what every prompt has in common (models/linear.py).
    """
    start, n_tokens = 0, hidden.shape[1]
    while start < n_tokens:
        left = n_tokens - start
        end = start + min(CHUNK, left // BLOCK * BLOCK or left)
        yield start, end
        start = end
