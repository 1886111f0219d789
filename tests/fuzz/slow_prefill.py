"""A prefill in plain loops: told which tokens each layer sees, it computes them all, head by head under a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkv import LLM

Entries = list[tuple[Tensor, Tensor]]  # of each KV head of a layer: k and v [n, D], k rotated


@torch.inference_mode()
def slow_prefill(
    llm: LLM, ids: Tensor, tokens: Sequence[Tensor], start: int = 0, earlier: Sequence[Entries] = ()
) -> tuple[Tensor, list[Entries]]:
    """One sequence, whose new tokens stand at the positions from `start` on.

    ids: int64 [1, N], the new tokens. tokens: of each layer int64 [n], which of them it sees, ascending, each layer's
    among those of the one before. earlier: of each layer what its heads hold already.
    Returns logits [1, V] of the last token, and of each layer the entries of its heads, earlier ones first.
    """
    model, seen = llm.model, tokens[0]
    model.reserve(start + ids.shape[1])
    hidden = model.embed(ids[:, seen])
    entries: list[Entries] = []
    for layer, block in enumerate(model.blocks):
        stays = torch.isin(seen, tokens[layer])
        seen, hidden = seen[stays], hidden[:, stays]
        before = earlier[layer] if earlier else None
        q, k, v = block.project(hidden, model.rope(start + seen[None]))
        group = q.shape[1] // k.shape[1]
        attended, of_layer = [], []
        for head in range(k.shape[1]):
            keys, values = k[0, head], v[0, head]
            if before is not None:
                keys, values = torch.cat((before[head][0], keys)), torch.cat((before[head][1], values))
            of_layer.append((keys, values))
            queries = q[0, head * group : (head + 1) * group]
            attended.append(_attention(queries, keys, values, model.config.windows[layer]))
        entries.append(of_layer)
        block.finish_(hidden, torch.cat(attended)[None])
    return model.head(hidden[:, -1]), entries


def _attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """q [G, T, D] of the last T of n entries, k and v [n, D] -> [G, T, D]."""
    n_new, n = q.shape[1], len(k)
    distance = torch.arange(n - n_new, n)[:, None] - torch.arange(n)
    unseen = (distance < 0) | (distance >= (n if window is None else window))
    logits = q @ k.T / q.shape[-1] ** 0.5
    return logits.masked_fill(unseen, float("-inf")).softmax(-1) @ v
