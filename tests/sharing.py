"""A model whose layers read others, by plain pieces: what the engine's way is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkv import LLM
from fastkv.engine.prefill import Prefill


def entries_and_hidden(
    llm: LLM, ids: Sequence[int], sources: Sequence[int], pre: Prefill | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """K and V [1, Hkv, N, D] that each layer attends to, and what the head is given, [1, N, E], by attention matrices.

    pre: says which tokens of a prompt each layer saw, and which of these the tokens after the prompt see.
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
            if pre is not None:
                n_prompt, saw = pre.tokens[0].shape[1], pre.tokens[layer][0].tolist()
                seen[:, :n_prompt, [at for at in range(n_prompt) if at not in saw]] = False
                for head, positions in enumerate(pre.kept[layer][0].tolist()):
                    seen[head, n_prompt:, [at for at in range(n_prompt) if at not in positions]] = False
                seen |= columns == rows  # else what no token sees would not be a number
            group = q.shape[1] // k.shape[1]
            keys, values, seen = (each.repeat_interleave(group, dim=each.dim() - 3) for each in (k, v, seen))
            products = (q @ keys.transpose(2, 3) / llm.config.head_dim**0.5).masked_fill(~seen, float("-inf"))
            hidden = block.mlp(hidden + block.attention_output(products.softmax(dim=-1) @ values))
        return found, model.norm(hidden)
