"""Look-ahead: tokens drafted over the compressed cache score the prompt again, then they are forgotten (2505.20334).

What an answer needs is attended to by the answer's own queries, which the prompt's last tokens can only guess. So a
prefill with `lookahead` = m holds the whole K and V of each layer, compresses as usual, and lets that cache draft m
tokens greedily, whatever the request's sampling settings are. The queries of these tokens score the held entries, each
layer chooses anew under the same budget, and the rest is dropped, as is the draft: logits, positions and propagated
tokens are those of the prefill itself.

Cost: m eager decode steps; a second scoring; and until then, in memory, K and V of every token that a dropping layer
saw (before the TSP layer all of them, after it the propagated ones), which RequestPlan.held_nbytes counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Drafted, Observation
from fastkv.engine.decode import run_layers
from fastkv.engine.decode_attention import EagerAttention, StepAttention
from fastkv.models.llama import Llama


@dataclass
class _Held:
    """What a layer saw, in memory of its own, at `positions` int64 [B, Hkv, T]; and each drafted token's q and k."""

    observed: Observation
    positions: Tensor
    q: list[Tensor] = field(default_factory=list)  # [B, Hq, 1, D]
    k: list[Tensor] = field(default_factory=list)  # [B, Hkv, 1, D]


class Lookahead:
    """The look-ahead of one prefill: `hold` for each layer that drops entries, then `draft`, then `release`."""

    def __init__(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._held: dict[int, _Held] = {}
        self._live: list[Tensor] = []  # for each drafted token bool [B]

    def hold(self, observed: Observation, positions: Tensor, window: int) -> None:
        """Copy what a layer saw: its K, V and the queries of the window."""
        q = observed.q[:, :, -window:].clone()
        held = Observation(observed.layer, q, observed.k.clone(), observed.v.clone(), observed.n_past)
        self._held[observed.layer] = _Held(held, positions)

    def draft(self, model: Llama, cache: KVCache, logits: Tensor, eos_ids: Collection[int]) -> int:
        """Draft greedily from logits [B, V], and make the cache forget it: how many tokens any sequence has drafted.

        A sequence ends before one of `eos_ids`; what is drafted for it beyond scores nothing.
        """
        ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=logits.device)
        live = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        for _ in range(self._n_tokens):
            tokens = logits.argmax(dim=-1)
            live = live & ~torch.isin(tokens, ends)
            if eos_ids and not live.any():
                break
            self._live.append(live)
            logits = self._step(model, cache, tokens)
        cache.truncate(len(self._live))
        return len(self._live)

    def release(self) -> Iterator[tuple[Observation, Tensor]]:
        """Each layer that was held, with what was drafted, and its positions. A layer's memory goes after its turn."""
        live = torch.stack(self._live, dim=1)
        for layer in list(self._held):
            held = self._held.pop(layer)
            of = held.observed
            drafted = Drafted(torch.cat(held.q, dim=2), torch.cat(held.k, dim=2), live)
            yield Observation(layer, of.q, of.k, of.v, of.n_past, drafted), held.positions

    def _step(self, model: Llama, cache: KVCache, tokens: Tensor) -> Tensor:
        """Append tokens, int64 [B], to the cache, and note their queries and keys: logits [B, V]."""
        attention = EagerAttention(cache.pool, [cache.slots], 1, model.config.windows)
        logits = run_layers(model, tokens.unsqueeze(1), cache.next_position.unsqueeze(1), self._noting(attention))
        cache.advance()
        return logits[:, 0]

    def _noting(self, attention: StepAttention) -> StepAttention:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer in self._held:
                self._held[layer].q.append(q)
                self._held[layer].k.append(k)
            return attention(layer, q, k, v)

        return attend
