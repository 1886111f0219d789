"""A model whose layers read others, by plain pieces: what the engine's way is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkv import LLM


def entries_and_hidden(
    llm: LLM,
    ids: Sequence[int],
    sources: Sequence[int],
    kept: Sequence[Tensor] | None = None,
    n_prompt: int | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """K and V [1, Hkv, N, D] that each layer attends to, and what the head is given, [1, N, E], by attention matrices.

    kept: of each layer the positions int64 [1, Hkv, n] of the first `n_prompt` tokens that later ones see.
    """
    model, n_tokens = llm.model, len(ids)
    hidden, rope = model.embed(torch.tensor([list(ids)])), model.rope_of_range(0, n_tokens)
    rows, columns = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    found: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for layer, block in enumerate(model.blocks):
            q, k, v = block.project(hidden, rope)
            if sources[layer] != layer:
                k, v = found[sources[layer]]
            found.append((k, v))
            window = llm.config.windows[layer]
            seen = (columns <= rows).expand(k.shape[1], -1, -1).clone()  # [Hkv, N, N]
            if window is not None:
                seen &= columns > rows - window
            if kept is not None and n_prompt is not None:
                for head, positions in enumerate(kept[layer][0].tolist()):
                    dropped = [at for at in range(n_prompt) if at not in positions]
                    seen[head, n_prompt:, dropped] = False
            group = q.shape[1] // k.shape[1]
            keys, values, seen = (each.repeat_interleave(group, dim=each.dim() - 3) for each in (k, v, seen))
            products = (q @ keys.transpose(2, 3) / llm.config.head_dim**0.5).masked_fill(~seen, float("-inf"))
            hidden = block.mlp(hidden + block.attention_output(products.softmax(dim=-1) @ values))
        return found, model.norm(hidden)
