"""One decode step, eagerly: a token in, the next token's logits out, one more entry in every layer's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.engine.attention import decode_attention
from fastkv.models.llama import Llama


@torch.inference_mode()
def decode_step(model: Llama, cache: KVCache, token_ids: Tensor) -> Tensor:
    """token_ids int64 [B] -> logits float32 [B, V].

    The token's position is the length of the text so far, however few entries the cache holds.
    Raises FastKVError when the cache or the context is full.
    """
    cache.check_room()
    hidden = model.embed(token_ids.unsqueeze(1))  # [B, 1, E]
    rope = model.rope(cache.next_position.unsqueeze(1))
    for layer, block in enumerate(model.blocks):
        window = model.config.window_of(layer)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer, window: int | None = window) -> Tensor:
            keys, values = cache.append(layer, k, v)
            if window is not None:
                # Entries are the last positions in order here: a policy that drops any is refused beyond the window.
                keys, values = keys[:, :, -window:], values[:, :, -window:]
            return decode_attention(q, keys, values)

        hidden = block.mlp(block.attention(hidden, rope, attend))
    cache.advance()
    return model.head(hidden[:, -1])
