"""A prefill in plain loops: told which tokens each layer sees, it computes them all, with a mask and no cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkv import LLM


@torch.inference_mode()
def slow_prefill(
    llm: LLM, ids: Tensor, tokens: list[Tensor], positions: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One prompt.

    ids: int64 [1, N]. tokens: of each layer int64 [n], places in the prompt, ascending, each layer's among those of the
    one before. positions: int64 [N], where each of the prompt's tokens stands for the rotation.
    Returns logits [1, V] of the last token, and of each layer k and v [Hkv, n, D], k rotated.
    """
    model, seen = llm.model, tokens[0]
    model.reserve(int(positions.max()) + 1)
    hidden = model.embed(ids[:, seen])
    keys, values = [], []
    for layer, block in enumerate(model.blocks):
        stays = torch.isin(seen, tokens[layer])
        seen, hidden = seen[stays], hidden[:, stays]
        window = model.config.windows[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = window) -> Tensor:
            keys.append(k[0])
            values.append(v[0])
            group, n = q.shape[1] // k.shape[1], q.shape[2]
            distance = torch.arange(n)[:, None] - torch.arange(n)
            hidden_from = (distance < 0) | (distance >= (n if window is None else window))
            logits = q @ k.repeat_interleave(group, 1).transpose(2, 3) / q.shape[-1] ** 0.5
            return logits.masked_fill(hidden_from, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)

        hidden = block.mlp(block.attention(hidden, model.rope(positions[None, seen]), attend))
    return model.head(hidden[:, -1]), keys, values
