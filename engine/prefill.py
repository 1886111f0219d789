"""Prefill: THE layer loop. Stages of layers, each layer's KV selection, and the TSP gather between stages.

A layer computes K and V of all its tokens, from them importance scores, and from these what stays in the cache and
which tokens are propagated. Where that is faster it then computes attention and MLP for these alone
(`_propagated_only`): a token whose state no later layer reads costs its key and value. So it is at the last layer,
which only the last token leaves. A sequence may begin here, or continue from its cache: then the new tokens attend to
what that holds, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import Kept, Part, followed
from fastkv.cache.mass import LayerMass, MassOfLayers
from fastkv.cache.policy import FirstPass, Observation, OnlineSelector
from fastkv.cache.selection import (
    PerHead,
    positions_of,
    positions_of_each,
    select_each,
    select_entries,
    select_per_head,
    select_tokens,
)
from fastkv.engine.attention import AUTO, attend_parts, causal_attention, take_tokens
from fastkv.engine.competing import CompetingLayers
from fastkv.engine.lookahead import Lookahead
from fastkv.engine.merged_attention import why_not_merged
from fastkv.engine.output_norms import output_norms
from fastkv.engine.plan import RequestPlan
from fastkv.engine.probe import repeat_prompt
from fastkv.engine.projection import Projection
from fastkv.engine.shared_layers import SharedEntries, SharedProjection
from fastkv.engine.tsp import TokenState
from fastkv.engine.workspace import Workspace
from fastkv.errors import FastKVError
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama

# On a GPU, prompts of so many tokens compute attention at the TSP layer for the propagated ones alone. On an H200 that
# is slower at 32K (17 to 20 ms instead of 14) and faster at 128K (140 to 150 instead of 245; the step tsp-layer of
# benchmarks/results/2026-11-28-gpu-h200.txt), and at 64K 1.18 to 1.33 times as fast (…-gpu-h200-sessions.txt).
_MERGED_FROM = 65_536


@dataclass(frozen=True)
class Prefill:
    """What a prefill gives back.

    logits: float32 [B, V], of the last token.
    tokens: for each layer int64 [B, T], the original positions of the new tokens whose keys it computed (the TSP layer:
    all of them); of a layer that reads another, those of the tokens that it saw.
    kept: for each layer int64 [B, Hkv, n], the original positions of the entries in its cache, ascending; where heads
    keep different numbers, -1 stands after those of the shorter ones. A layer that reads another has that one's.
    cache: holds those entries, with room for `max_tokens` more.
    mass: for each layer how much of the attention mass it keeps (cache/mass.py); None where the policy looks at no
    window's attention.
    """

    logits: Tensor
    tokens: list[Tensor]
    kept: list[Tensor]
    cache: KVCache
    mass: list[LayerMass | None] = field(default_factory=list)

    @property
    def layer_tokens(self) -> list[int]:
        """How many tokens each layer saw."""
        return [positions.shape[1] for positions in self.tokens]


@torch.inference_mode()
def prefill(
    model: Llama,
    ids: Tensor,
    plan: RequestPlan,
    cache: KVCache,
    workspace: Workspace,
    attention: str = AUTO,
    eos_ids: Collection[int] = (),
    whole: KVCache | None = None,
    kind: type[LayerRun] | None = None,
) -> Prefill:
    """Run the new tokens `ids`, int64 [B, N], through all layers, into `cache`, which may hold a sequence already.

    attention: the backend of causal attention. Full K/V of one layer at a time is there, in the `workspace`: a layer
    keeps its share in the cache, and the next one writes over the rest. (Look-ahead and competing layers hold it for
    longer: engine/lookahead.py, engine/competing.py.) eos_ids: the tokens that end an answer, and the draft of a
    look-ahead. whole: a second, empty cache, which keeps all tokens of every layer; of a plan that propagates them all.
    kind: how the layers are run (None: all on the device).
    """
    run = (kind or LayerRun)(model, plan, cache, workspace, attention, whole)
    start = cache.position
    model.reserve(start + plan.positions)
    cache.begin(whole=not plan.compresses, room=plan.max_tokens)
    if whole is not None:
        whole.begin(whole=True, room=plan.max_tokens)
    origins = None if plan.first_pass is None else run.choose(ids, plan.first_pass)
    state, rope = run.start(ids if origins is None else ids.gather(1, origins), start)
    tokens: list[Tensor] = []
    kept: list[Tensor] = []
    for layer in range(len(plan.layers)):
        tokens.append(state.positions)
        state, rope = run.layer(layer, state, rope)
        source = plan.shared[layer] if plan.shared else layer
        kept.append(run.positions if source == layer else kept[source])
    logits = model.head(state.hidden[:, -1])
    for layer, positions in run.competed(ids):
        kept[layer] = positions
    for layer, positions in run.looked_ahead(logits, start + plan.layers[0].seen, eos_ids):
        kept[layer] = positions
    for each in (cache,) if whole is None else (cache, whole):
        each.end(start + plan.layers[0].seen, plan.position_limit)
    cache.reader = plan.reader(cache)
    if origins is not None:
        tokens = [origins.gather(1, positions) for positions in tokens]
        kept = [origins.unsqueeze(1).expand(-1, of.shape[1], -1).gather(2, of) for of in kept]
    return Prefill(logits, tokens, kept, cache, run.mass.layers)


class LayerRun:
    """One prefill, layer by layer. positions: int64 [B, Hkv, n], what the cache holds of the last layer that ran."""

    positions: Tensor

    def __init__(
        self,
        model: Llama,
        plan: RequestPlan,
        cache: KVCache,
        workspace: Workspace,
        attention: str = AUTO,
        whole: KVCache | None = None,
    ) -> None:
        assert whole is None or all(layer.propagated is None for layer in plan.layers), (
            "not every layer sees all tokens"
        )
        self.model, self.plan, self.cache, self.attention = model, plan, cache, attention
        self.whole = whole
        self.store: Callable[[int, Tensor, Tensor, Kept, Tensor], None] = cache.store
        self.policy, self.layers = plan.policy, list(plan.layers)
        self.per_head = plan.policy.per_head
        self.shared = SharedEntries(plan.shared, cache, plan.copies_shared) if plan.shared else None
        self.projection = (
            Projection(model, workspace) if self.shared is None else SharedProjection(model, workspace, self.shared)
        )
        self.workspace = workspace
        self.windows = model.config.windows
        self.ahead = Lookahead(plan.lookahead) if plan.lookahead else None
        room = 0 if plan.probe is None else plan.probe.longest
        self.competing = CompetingLayers(plan.policy, room) if plan.policy.over_layers else None
        # Nobody measures what a first pass drops.
        self.mass = MassOfLayers(cache.batch, model.device, known=plan.first_pass is None)
        self.idle_hidden = "other hidden"  # of the two buffers for hidden states the one that is not in use
        # A policy may decide during the prefill at which layer tokens are dropped; the plan then says at the latest.
        self.keep = next((layer.propagated for layer in self.layers if layer.propagated is not None), None)
        self.selector: OnlineSelector | None = None
        if self.keep is not None:
            self.selector = self.policy.online_selector(len(self.layers), plan.n_tokens)
        if self.selector is not None:
            self.layers = [replace(layer, propagated=None) for layer in self.layers]

    def start(self, ids: Tensor, position: int = 0) -> tuple[TokenState, Rope]:
        """Embedding and rotation of new tokens: ids int64 [B, N], the first of them at `position`."""
        shape = (*ids.shape, self.model.config.hidden_size)
        hidden = self.workspace.take("hidden", shape, like=self.model)
        state = TokenState.start(ids, self.model.embed(ids, out=hidden), position)
        return state, self.model.rope_of_range(position, ids.shape[1])

    def choose(self, ids: Tensor, first: FirstPass) -> Tensor:
        """The tokens that a first pass chooses of ids, int64 [B, N]: int64 [B, first.keep], ascending."""
        state, rope = self.start(ids)
        for layer in range(first.layer):
            q, k, v = self.projection.everything(layer, state.hidden, rope)
            self.projection.finish_(layer, state.hidden, self._attend_all(layer, q, [Part(k, v)]))
        q, k, v = self.projection.keys(first.layer, state.hidden, rope, self._n_queries(ids.shape[1]))
        positions = state.positions.unsqueeze(1).expand(-1, k.shape[1], -1)
        observed = self._observed(first.layer, q, k, v, positions)
        return select_tokens(observed.all_heads(self._score(observed)), first.keep, self.policy.window)

    def layer(self, layer: int, state: TokenState, rope: Rope) -> tuple[TokenState, Rope]:
        """Keys, selection, then attention and MLP of the tokens that are propagated: those, and their rotation."""
        last = layer == len(self.layers) - 1
        may_drop = self.layers[layer].propagated is not None or self.selector is not None
        if last or (may_drop and _propagated_only_pays(self.model, state.ids.shape[1], self.windows[layer])):
            return self._propagated_only(layer, state, rope, last)
        q, k, v = self.projection.everything(layer, state.hidden, rope)
        parts, chosen = self.select(layer, state, q, k, v)
        attended = self._attend_all(layer, q, parts)
        if chosen is not None:
            state, attended = self._gather(state, chosen), take_tokens(attended, chosen)
            rope = self.model.rope(state.positions)
        self.projection.finish_(layer, state.hidden, attended)
        return state, rope

    def _propagated_only(self, layer: int, state: TokenState, rope: Rope, last: bool) -> tuple[TokenState, Rope]:
        """The same for a layer that fewer tokens leave than enter: no queries, attention and MLP of the others."""
        n_tokens = state.ids.shape[1]
        q, k, v = self.projection.keys(layer, state.hidden, rope, self._n_queries(n_tokens))
        parts, chosen = self.select(layer, state, q, k, v)
        if last:
            chosen = state.last_token()
        if chosen is None:  # the selector lets all tokens through
            q = self.projection.queries(layer, state.hidden, rope)
            self.projection.finish_(layer, state.hidden, self._attend_all(layer, q, parts))
            return state, rope
        state = self._gather(state, chosen)
        rope = self.model.rope(state.positions)
        q = self.model.blocks[layer].project_q(state.hidden, rope)
        window = self.windows[layer]
        self.projection.finish_(layer, state.hidden, attend_parts(parts, q, window, chosen, n_tokens))
        return state, rope

    def select(
        self, layer: int, state: TokenState, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[list[Part], Tensor | None]:
        """Let the policy score the tokens, and fill the layer's cache.

        q: [B, Hq, n, D] of the last n tokens, k and v: [B, Hkv, T, D] of all. Returns what queries of this layer attend
        to, and the indices of the tokens that are propagated, int64 [B, n] (None: all).
        """
        if self.shared is not None and self.shared.source(layer) != layer:
            return [Part(k, v)], self._select_of_another(layer, state, q, k, v)
        if self.whole is not None:
            self.whole.store(layer, k, v, None, state.positions.unsqueeze(1))
        sizes, past = self.layers[layer], self.plan.past[layer]
        drops = sizes.least < past + k.shape[2]
        if not (drops or sizes.propagated is not None or self.selector is not None):
            return self._keep_all(layer, state, k, v), None
        positions = self._positions_with(layer, state.positions)
        if past:
            k, v = self.projection.joined(self.cache.read(layer), k, v)
        observed = self._observed(layer, q, k, v, positions, past)
        if self.competing is not None:
            scores_now = None if self.plan.probe is not None else self._score(observed)
            self.competing.hold(observed, positions, sizes.kept, scores_now)
            self.positions = positions
            return [Part(k, v)], None
        scores = self.fill(observed, positions)
        if drops and self.ahead is not None:
            self.ahead.hold(observed, positions, self.policy.window)
        if sizes.propagated is None and self.selector is None:
            return [Part(k, v)], None
        return [Part(k, v)], self._chosen(observed, scores)

    def _select_of_another(self, layer: int, state: TokenState, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Of a layer that reads another's k and v, and keeps nothing: the indices of the tokens that are propagated."""
        if self.plan.compresses:
            self.mass.keep_unknown()
        else:
            self.mass.keep_all()
        if self.layers[layer].propagated is None:
            return None
        observed = self._observed(layer, q, k, v, self._positions_with(layer, state.positions))
        return self._chosen(observed, self._score(observed))

    def _chosen(self, observed: Observation, scores: Tensor) -> Tensor | None:
        """The indices of the tokens that are propagated after a layer, int64 [B, n], or None: all of them."""
        propagated = self.layers[observed.layer].propagated
        chosen = self._propagated(observed.layer, self.policy.importance(observed, scores, propagated))
        self.mass.propagate(observed, chosen, self.policy.window)
        return chosen

    def _observed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, past: int = 0) -> Observation:
        """What the policy sees of a layer, whose entries stand at `positions` [B, Hkv, past + T]."""
        attention = self.model.blocks[layer].self_attn
        rotary = self.model.rotary.each[attention.rotary]
        output = partial(output_norms, attention)
        heads = self.model.ranks
        return Observation(layer, q, k, v, past, output=output, positions=positions, rotary=rotary, heads=heads)

    def fill(self, observed: Observation, positions: Tensor) -> Tensor:
        """Let the policy score what a layer saw, at `positions` [B, Hkv, T], and keep its share. -> the scores."""
        scores, sizes, n_entries = self._score(observed), self.layers[observed.layer], observed.k.shape[2]
        most = min(sizes.kept, n_entries)
        counts: Tensor | int = most
        if sizes.least < most:
            counts = self.policy.counts(observed, len(self.layers), scores, sizes.least, most)
        if self.per_head and isinstance(counts, int) and counts < n_entries and observed.heads is not None:
            counts = self._head_budgets(observed, counts, scores)  # sequences differ in what these heads have together
        if isinstance(counts, Tensor):
            ranking = self.policy.ranking(observed, scores, counts)
            self._store_each(observed, select_each(ranking, counts, self.policy.window), positions)
            return scores
        kept = self._best(observed, counts, scores) if counts < n_entries else None
        self.positions = positions if kept is None else positions_of(kept, positions)
        self.store(observed.layer, observed.k, observed.v, kept, self.positions)
        self.mass.keep(observed, kept, self.policy.window)
        return scores

    def _store_each(self, observed: Observation, kept: list[PerHead], positions: Tensor) -> None:
        """Keep what each sequence has chosen of a layer's entries, at `positions` [B, Hkv, T]."""
        self.positions = positions_of_each(kept, positions)
        self.cache.store_each(observed.layer, observed.k, observed.v, kept, self.positions)
        self.mass.keep(observed, kept, self.policy.window)

    def looked_ahead(self, logits: Tensor, end: int, eos_ids: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Draft after the last layer, and let the layers choose again: each layer, and the positions that it now keeps.

        logits: [B, V], of the last token. end: the position after it.
        """
        if self.ahead is None:
            return
        if self.ahead.draft(self.model, self.cache, logits, end, eos_ids):
            for observed, positions in self.ahead.release():
                self.fill(observed, positions)
                yield observed.layer, self.positions

    def competed(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Give out the budgets of all layers, where they compete: each layer, and the positions that it keeps.

        ids: of the prompt, int64 [B, N], which the model repeats first if the policy wants that.
        """
        if self.competing is None:
            return
        if self.plan.probe is not None:
            layers = self.competing.layers
            probed = repeat_prompt(self.model, self.plan.probe, ids, self.projection, self.workspace, layers)
            self.competing.score(self._score, probed)
        for observed, kept, positions in self.competing.chosen():
            self._store_each(observed, kept, positions)
            yield observed.layer, self.positions

    def _best(self, observed: Observation, count: int, scores: Tensor) -> Kept:
        """The entries that a layer keeps: `count` of each head, or on average."""
        if not self.per_head:
            return select_entries(self.policy.ranking(observed, scores, count), count, self.policy.window)
        counts = self._head_budgets(observed, count, scores)
        return select_per_head(self.policy.ranking(observed, scores, counts), counts, self.policy.window)

    def _head_budgets(self, observed: Observation, count: int, scores: Tensor) -> Tensor:
        """How many entries each of this model's heads keeps, where those of a layer keep `count` on average."""
        of_all = observed.all_heads(scores)
        return observed.own_heads(self.policy.head_budgets(observed.layer, len(self.layers), count, of_all))

    def _score(self, observed: Observation) -> Tensor:
        """The policy's scores. Raises FastKVError if they are not as many as tokens stand before its window."""
        scores = self.policy.score(observed)
        batch, n_heads, n_entries, _ = observed.k.shape
        expected = (batch, n_heads, n_entries - self.policy.window)
        if scores.shape != expected:
            raise FastKVError(
                f"policy {self.policy.name}: score must give [B, Hkv, n_past + T - window], {list(expected)}, of "
                f"layer {observed.layer}, not {list(scores.shape)}"
            )
        return scores

    def _keep_all(self, layer: int, state: TokenState, k: Tensor, v: Tensor) -> list[Part]:
        self.mass.keep_all()
        if self.plan.compresses:
            self.positions = self._positions_with(layer, state.positions)
        else:  # every layer holds the same, which takes no memory
            self.positions = self.cache.positions(layer, self.cache.position + self.plan.n_tokens)
        if not self.plan.past[layer]:
            self.cache.store(layer, k, v, None, self.positions)
            return [Part(k, v)]
        if self.plan.layout.kv_dtype is not None:  # the new tokens attend to one another before any is packed
            parts = [followed(part, k, v) for part in self.cache.read(layer)]
            self.cache.extend(layer, k, v, self.positions)
            return parts
        self.cache.extend(layer, k, v, self.positions)
        return self.cache.read(layer)

    def _propagated(self, layer: int, scores: Tensor) -> Tensor | None:
        """The indices of the tokens that are propagated after this layer, int64 [B, n], or None: all of them."""
        importance: Tensor | None = scores
        keep = self.layers[layer].propagated
        if self.selector is not None:
            importance, keep = self.selector(layer, scores), self.keep
        if importance is None or keep is None:
            return None
        self.selector = None
        return select_tokens(importance, keep, self.policy.window)

    def _gather(self, state: TokenState, chosen: Tensor) -> TokenState:
        """The tokens that are propagated, moved into the other buffer."""
        out = self.workspace.take(self.idle_hidden, (*chosen.shape, state.hidden.shape[-1]), like=state.hidden)
        self.idle_hidden = "hidden" if self.idle_hidden == "other hidden" else "other hidden"
        if self.shared is not None:
            self.shared.propagate(chosen)
        return state.take(chosen, out)

    def _attend_all(self, layer: int, q: Tensor, parts: list[Part]) -> Tensor:
        """Attention of all new tokens: q [B, Hq, T, D] -> the same shape."""
        window = self.windows[layer]
        if len(parts) == 1 and parts[0].k.shape[2] == q.shape[2]:
            return causal_attention(q, parts[0].k, parts[0].v, window, self.attention)
        return attend_parts(parts, q, window)

    def _n_queries(self, n_tokens: int) -> int:
        """How many of the last queries the policy looks at."""
        return n_tokens if self.policy.needs_all_queries else self.policy.n_queries

    def _positions_with(self, layer: int, new: Tensor) -> Tensor:
        """The positions of what the cache holds of a layer and of new tokens, int64 [B, T]: [B, Hkv, n + T]."""
        every_head = new.unsqueeze(1).expand(-1, self.model.config.n_kv_heads, -1)
        return torch.cat((self.cache.positions(layer), every_head), dim=2) if self.plan.past[layer] else every_head


def _propagated_only_pays(model: Llama, n_tokens: int, window: int | None) -> bool:
    """Whether attention of the propagated tokens alone is faster than that of all tokens, of which there are n_tokens.

    Alone they need a mask. Measured on a CPU (benchmarks/choices.py). On a GPU masked attention leaves the fast
    kernels, and so nothing is gained by it, but merging its parts (engine/merged_attention.py) keeps most of it there.
    """
    if model.device.type == "cpu":
        return True
    if window is not None or n_tokens < _MERGED_FROM:
        return False
    config = model.config
    return why_not_merged(config.n_heads // config.n_kv_heads, config.head_dim, model.dtype, model.device) is None
