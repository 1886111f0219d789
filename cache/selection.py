"""From scores to indices: which entries and tokens stay. Indices count within what a layer saw, ascending."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def select_entries(scores: Tensor, count: int, window: int) -> Tensor:
    """The `count` entries that each KV head keeps: its best-scored ones and the last `window`.

    scores: [B, Hkv, T - window]; window <= count < T. Returns int64 [B, Hkv, count].
    """
    return _best_and_window(scores, count, window)


def select_tokens(scores: Tensor, count: int, window: int) -> Tensor:
    """The `count` tokens that are propagated to later layers: the best by the sum over heads, and the last `window`.

    scores: [B, Hkv, T - window]; window <= count < T. Without a window the last token is propagated all the same: the
    logits are its own. Returns int64 [B, count].
    """
    importance = scores.sum(dim=1)
    if not window:
        importance[:, -1] = float("inf")
    return _best_and_window(importance, count, window)


def competed_counts(scores: Tensor, count: int, window: int, floor: float) -> Tensor:
    """How many entries each KV head keeps where the heads of a layer compete (arXiv 2407.11550): int64 [B, Hkv].

    scores: [B, Hkv, T - window]; the best of the layer win. count: the mean over the heads, the window included. floor:
    share of it, the window left out, that each head has before the rest is competed for.
    """
    batch, n_heads, before = scores.shape
    mean = count - window
    safe = scores.topk(int(floor * mean), dim=-1).indices
    competing = scores.scatter(2, safe, float("inf")).flatten(1)
    winners = competing.topk(n_heads * mean, dim=-1).indices // before  # [B, Hkv * mean], the head of each
    counts = winners.new_full((batch, n_heads), window)
    return counts.scatter_add_(1, winners, winners.new_ones(winners.shape))


def competed_counts_of_layers(scores: Sequence[Tensor], count: int, window: int, floor: float) -> list[Tensor]:
    """As `competed_counts` where the heads of all layers compete (arXiv 2510.13334): for each layer int64 [B, Hkv].

    scores: those of each layer. count: the mean over the heads of the model.
    """
    together = competed_counts(torch.cat(tuple(scores), dim=1), count, window, floor)
    return list(together.chunk(len(scores), dim=1))


def _best_and_window(scores: Tensor, count: int, window: int) -> Tensor:
    # Exactly topk over the columns before the window: pooling makes ties, and this is how they fall in the paper's
    # implementation on the same device.
    best = scores.topk(count - window, dim=-1).indices
    before = scores.shape[-1]
    recent = torch.arange(before, before + window, device=scores.device).expand(*best.shape[:-1], window)
    return torch.cat((best.sort(dim=-1).values, recent), dim=-1)


@dataclass(frozen=True)
class PerHead:
    """Which of the T tokens that a layer saw each KV head keeps, where heads keep different numbers.

    counts: int64 [B, Hkv], entries of each head. index: int64 [B, M], head * T + token, ascending: the entries of a
    head follow one another, and every sequence has M in all.
    """

    counts: Tensor
    index: Tensor
    n_tokens: int

    @classmethod
    def everything(cls, k: Tensor) -> PerHead:
        """All tokens of k [B, Hkv, T, D] in each head."""
        batch, n_heads, n_tokens, _ = k.shape
        counts = torch.full((batch, n_heads), n_tokens, dtype=torch.int64, device=k.device)
        return cls(counts, torch.arange(n_heads * n_tokens, device=k.device).expand(batch, -1), n_tokens)

    @classmethod
    def evenly(cls, kept: Tensor, n_tokens: int) -> PerHead:
        """Heads that keep equally many of `n_tokens`: kept int64 [B, Hkv, n], ascending."""
        batch, n_heads, count = kept.shape
        first = torch.arange(n_heads, device=kept.device).view(1, -1, 1) * n_tokens
        counts = torch.full((batch, n_heads), count, dtype=torch.int64, device=kept.device)
        return cls(counts, (kept + first).flatten(1), n_tokens)

    @property
    def heads(self) -> Tensor:
        """int64 [B, M]: the head of each entry."""
        return self.index // self.n_tokens

    @property
    def before(self) -> Tensor:
        """int64 [B, Hkv]: entries of the heads before each."""
        return self.counts.cumsum(1) - self.counts

    def positions(self, positions: Tensor) -> Tensor:
        """What is kept of tokens at `positions`, int64 [B, T]: int64 [B, Hkv, n], n being the longest head's number.

        After the last of a shorter head stand -1.
        """
        batch, n_heads = self.counts.shape
        longest = int(self.counts.max())
        ranks = torch.arange(self.index.shape[1], device=self.index.device) - self.before.gather(1, self.heads)
        kept = torch.full((batch, n_heads * longest), -1, dtype=torch.int64, device=positions.device)
        kept.scatter_(1, self.heads * longest + ranks, positions.gather(1, self.index % self.n_tokens))
        return kept.view(batch, n_heads, longest)


def select_per_head(scores: Tensor, counts: Tensor, window: int) -> PerHead:
    """Each KV head keeps as many entries as `counts` says: its best-scored ones and the last `window`.

    scores: [B, Hkv, T - window]. counts: int64 [B, Hkv], each from `window` to T, with the same sum for every sequence.
    """
    batch, n_heads, before = scores.shape
    # Sorted and not topk: of equal scores the first tokens win, whatever the longest head or other sequences ask for.
    best = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(before, device=scores.device) < (counts - window).unsqueeze(-1)
    kept = torch.ones(batch, n_heads, before + window, dtype=torch.bool, device=scores.device)
    kept.scatter_(2, best, chosen)
    index = kept.flatten(1).nonzero()[:, 1].view(batch, -1)
    return PerHead(counts, index, before + window)


def select_each(scores: Tensor, counts: Tensor, window: int) -> list[PerHead]:
    """As select_per_head, for sequences that keep different numbers of entries: one for each of them."""
    rows = zip(scores.split(1), counts.split(1), strict=True)
    return [select_per_head(of_row, count, window) for of_row, count in rows]


def positions_of_each(kept: Sequence[PerHead], positions: Tensor) -> Tensor:
    """Where what each sequence keeps stands, of entries at `positions` int64 [B, Hkv, T]: int64 [B, Hkv, n].

    After the last of a shorter head stand -1.
    """
    rows = [of_row.positions(positions[row : row + 1, 0])[0] for row, of_row in enumerate(kept)]
    longest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[1]), value=-1) for row in rows])


def positions_of(kept: Tensor | PerHead, positions: Tensor) -> Tensor:
    """Where what is kept stands, of entries at `positions` int64 [B, Hkv, T], which PerHead has alike in all heads.

    int64 [B, Hkv, n]; see PerHead.positions for heads of different lengths.
    """
    return kept.positions(positions[:, 0]) if isinstance(kept, PerHead) else positions.gather(2, kept)
