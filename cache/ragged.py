"""KV heads that keep different numbers of entries: which ones, and a cache that gives each head just its own slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache


@dataclass(frozen=True)
class RaggedEntries:
    """Which of the T tokens that a layer saw each KV head keeps.

    counts: int64 [B, Hkv], tokens of each head. index: int64 [B, M], head * T + token, ascending; a head's tokens are
    therefore side by side, and every text has M of them in all.
    """

    counts: Tensor
    index: Tensor
    n_tokens: int

    @classmethod
    def everything(cls, k: Tensor) -> RaggedEntries:
        """All tokens of k [B, Hkv, T, D] in each head."""
        batch, n_heads, n_tokens, _ = k.shape
        counts = torch.full((batch, n_heads), n_tokens, dtype=torch.int64, device=k.device)
        return cls(counts, torch.arange(n_heads * n_tokens, device=k.device).expand(batch, -1), n_tokens)

    @property
    def heads(self) -> Tensor:
        """int64 [B, M]: the head of each entry."""
        return self.index // self.n_tokens

    @property
    def before(self) -> Tensor:
        """int64 [B, Hkv]: entries of the heads in front of each."""
        return self.counts.cumsum(1) - self.counts

    def positions(self, positions: Tensor) -> Tensor:
        """What is kept of tokens at `positions`, int64 [B, T]: int64 [B, Hkv, n], n being the longest head's number.

        Behind the last of a shorter head stand -1.
        """
        batch, n_heads = self.counts.shape
        longest = int(self.counts.max())
        ranks = torch.arange(self.index.shape[1], device=self.index.device) - self.before.gather(1, self.heads)
        kept = torch.full((batch, n_heads * longest), -1, dtype=torch.int64, device=positions.device)
        kept.scatter_(1, self.heads * longest + ranks, positions.gather(1, self.index % self.n_tokens))
        return kept.view(batch, n_heads, longest)


def select_ragged(scores: Tensor, counts: Tensor, window: int) -> RaggedEntries:
    """Each KV head keeps as many tokens as `counts` says: its best-scored ones and the last `window`.

    scores: [B, Hkv, T - window]. counts: int64 [B, Hkv], each from `window` to T, with the same sum for every text.
    """
    batch, n_heads, before = scores.shape
    # Sorted and not topk: of equal scores the first tokens win, whatever the longest head or the other texts ask for.
    best = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(before, device=scores.device) < (counts - window).unsqueeze(-1)
    kept = torch.ones(batch, n_heads, before + window, dtype=torch.bool, device=scores.device)
    kept.scatter_(2, best, chosen)
    index = kept.flatten(1).nonzero()[:, 1].view(batch, -1)
    return RaggedEntries(counts, index, before + window)


class RaggedKVCache(KVCache):
    """A KVCache whose heads differ in length: `k[l]` and `v[l]` are [B, S_l, D], S_l being the slots of all heads.

    Each head's slots follow those of the head before it, with room for `max_tokens` behind its own entries. S_l is what
    heads of the same length would have together (Hkv * C_l): memory that one head does without is the other heads'.
    `kept[l]` is the mean over the heads.
    """

    ragged = True

    def __init__(self, kept: list[int], max_tokens: int, **others: Any) -> None:
        super().__init__(kept, max_tokens, **others)
        flat = [self.storage.flat(layer) for layer in range(len(kept))]
        for pair in flat:  # the next text's heads end elsewhere: see KVStorage.start
            for buffer in pair:
                buffer.zero_()
        slots = [self.n_kv_heads * count for count in self.capacities(kept, max_tokens)]
        self.k = [k[:, :count] for (k, _), count in zip(flat, slots, strict=True)]
        self.v = [v[:, :count] for (_, v), count in zip(flat, slots, strict=True)]
        self.counts: list[list[list[int]]] = [[] for _ in kept]  # of each layer, text and head, as loaded
        self._starts: list[list[list[int]]] = [[] for _ in kept]

    @property
    def spans(self) -> list[int]:
        # One head may have nearly all of them. How many it has changes from text to text, and a span is captured.
        return [buffer.shape[1] for buffer in self.k]

    @property
    def entries(self) -> int:
        return sum(map(sum, (layer[0] for layer in self.counts)))

    def load(self, layer: int, k: Tensor, v: Tensor, entries: Tensor | RaggedEntries | None) -> None:
        """Store what the prefill keeps of k and v [B, Hkv, T, D]: the `entries`, or all (None)."""
        chosen = RaggedEntries.everything(k) if entries is None else entries
        assert isinstance(chosen, RaggedEntries), "heads of one length belong into a KVCache"
        slots = torch.arange(chosen.index.shape[1], device=k.device) + chosen.heads * self.max_tokens
        slots = slots.unsqueeze(2).expand(-1, -1, k.shape[-1])
        rows = chosen.index.unsqueeze(2).expand_as(slots)
        self.k[layer].scatter_(1, slots, k.flatten(1, 2).gather(1, rows))
        self.v[layer].scatter_(1, slots, v.flatten(1, 2).gather(1, rows))
        starts = chosen.before + torch.arange(k.shape[1], device=k.device) * self.max_tokens
        self.storage.starts[layer] = starts
        self.lengths[layer] = chosen.counts
        self.counts[layer], self._starts[layer] = chosen.counts.tolist(), starts.tolist()

    def length(self, layer: int) -> int:
        raise NotImplementedError("heads differ in length: see `counts`")

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("heads differ in length: see `append_to_heads`")

    def append_to_heads(self, layer: int, k: Tensor, v: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """Write one token's k and v [B, Hkv, 1, D] into the next slot of each head of `layer`.

        Returns, for each text and head, views on its live entries, the new one included: [1, 1, n, D] each.
        """
        self.storage.write(layer, k, v)
        return [
            [self._head(layer, text, head) for head in range(self.n_kv_heads)]
            for text in range(len(self.counts[layer]))
        ]

    def _head(self, layer: int, text: int, head: int) -> tuple[Tensor, Tensor]:
        """The live entries of a head, one that was appended in this step included."""
        start = self._starts[layer][text][head]
        live = slice(start, start + self.counts[layer][text][head] + self.appended + 1)
        return self.k[layer][text, live][None, None], self.v[layer][text, live][None, None]
