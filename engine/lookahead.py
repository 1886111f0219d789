"""Look-ahead: tokens drafted from the whole prompt score it again, then they are forgotten (after arXiv 2505.20334).

What an answer needs is attended to by the answer's own queries, which the prompt's last tokens can only guess. So a
prefill with `lookahead` = m holds the whole K and V that each layer saw, and drafts m tokens greedily over them,
whatever the request's sampling settings are. The queries of these tokens score the held entries, each layer chooses
anew under the same budget, and the rest is dropped, as is the draft: logits, positions and propagated tokens are those
of the prefill itself.

What differs from the paper: it drafts over the compressed cache. What is held allows more, and where that cache lacks
the answer it drafts something else, and then keeps the entries for that.

Cost: m decode steps over a full cache; a second scoring; and until then, in memory, K and V of every token that
a layer saw (before the TSP layer all of them, after it the propagated ones), which RequestPlan.held_nbytes counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Drafted, Observation
from fastkv.engine.attention import decode_attention
from fastkv.engine.decode import run_layers
from fastkv.models.llama import Llama


@dataclass
class _Held:
    """K and V that a layer saw, [B, Hkv, T + m, D] with room for the draft; `count` tokens are there.

    seen, positions (int64 [B, Hkv, T]): of a layer that drops entries, which is to choose again. q: [B, Hq, 1, D] of
    each drafted token.
    """

    k: Tensor
    v: Tensor
    count: int
    seen: Observation | None = None
    positions: Tensor | None = None
    q: list[Tensor] = field(default_factory=list)

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[:, :, self.count : self.count + 1], self.v[:, :, self.count : self.count + 1] = k, v
        self.count += 1
        self.q.append(q)


class Lookahead:
    """The look-ahead of one prefill: `hold` for each layer that drops entries, then `draft`, then `release`."""

    def __init__(self, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._held: dict[int, _Held] = {}
        self._live: list[Tensor] = []  # for each drafted token bool [B]

    def hold(self, observed: Observation, positions: Tensor, window: int) -> None:
        """Copy what a layer saw: its K, V and the queries of the window."""
        held = self._copied(observed.k.shape, like=observed.k)
        n_tokens = held.count = observed.k.shape[2]
        held.k[:, :, :n_tokens], held.v[:, :, :n_tokens] = observed.k, observed.v
        k, v = held.k[:, :, :n_tokens], held.v[:, :, :n_tokens]
        held.seen = replace(observed, q=observed.q[:, :, -window:].clone(), k=k, v=v, noted={})
        held.positions = positions
        self._held[observed.layer] = held

    def draft(self, model: Llama, cache: KVCache, logits: Tensor, end: int, eos_ids: Collection[int]) -> bool:
        """Draft greedily from logits [B, V]: whether any sequence has drafted a token.

        end: the position of the first one. A sequence ends before one of `eos_ids`; what is drafted for it beyond
        scores nothing. The cache stays as it is; of a layer that dropped nothing it is where K and V are found.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer not in self._held:
                self._held[layer] = self._whole(cache, layer, like=k)
            held = self._held[layer]
            held.append(q, k, v)
            return decode_attention(q, held.k[:, :, : held.count], held.v[:, :, : held.count])

        ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=logits.device)
        live = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        positions = torch.full_like(live, end, dtype=torch.int64).unsqueeze(1)
        for step in range(self._n_tokens):
            tokens = logits.argmax(dim=-1)
            live = live & ~torch.isin(tokens, ends)
            if eos_ids and not live.any():
                break
            self._live.append(live)
            logits = run_layers(model, tokens.unsqueeze(1), positions + step, attend)[:, 0]
        return bool(self._live)

    def release(self) -> Iterator[tuple[Observation, Tensor]]:
        """Each layer that is to choose again: what it saw, and its positions. A layer's memory goes after its turn."""
        live = torch.stack(self._live, dim=1)
        for layer in sorted(self._held):
            held = self._held.pop(layer)
            if held.seen is not None and held.positions is not None:
                k = held.k[:, :, held.seen.k.shape[2] : held.count]
                yield replace(held.seen, drafted=Drafted(torch.cat(held.q, dim=2), k, live)), held.positions

    def _whole(self, cache: KVCache, layer: int, like: Tensor) -> _Held:
        """A copy of what the cache holds of a layer that keeps all it saw."""
        batch, n_heads, _, head_dim = like.shape
        held = self._copied((batch, n_heads, cache.count(layer), head_dim), like)
        held.count = cache.count(layer)
        for part in cache.read(layer):
            held.k[part.sequences, part.heads, : held.count] = part.k
            held.v[part.sequences, part.heads, : held.count] = part.v
        return held

    def _copied(self, shape: Sequence[int], like: Tensor) -> _Held:
        """Memory for entries [B, Hkv, T, D], and for those that are drafted."""
        size = (*shape[:2], shape[2] + self._n_tokens, shape[3])
        return _Held(like.new_empty(size), like.new_empty(size), 0)
