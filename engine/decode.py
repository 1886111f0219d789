"""One decode step, eagerly: a token in, the next token's logits out, one more entry in every layer's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.engine.attention import decode_attention
from fastkv.models.llama import Llama

# (layer, q [B, Hq, 1, D], k and v [B, Hkv, 1, D]) -> [B, Hq, 1, D]: keeps k and v, and attends to all that is kept
AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def decode_step(model: Llama, cache: KVCache, token_ids: Tensor) -> Tensor:
    """token_ids int64 [B] -> logits float32 [B, V].

    The token's position is the length of the text so far, however few entries the cache holds.
    Raises FastKVError when the cache or the context is full.
    """
    cache.check_room()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.append(layer, k, v)
        window = model.config.window_of(layer)
        if window is not None:
            # Entries are the last positions in order here: a policy that drops any is refused beyond the window.
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        return decode_attention(q, keys, values)

    logits = one_token(model, token_ids, cache.next_position, attend)
    cache.advance()
    return logits


def one_token(model: Llama, token_ids: Tensor, positions: Tensor, attend: AttendLayer) -> Tensor:
    """The layers for one token of each text: token_ids and positions int64 [B] -> logits float32 [B, V]."""
    hidden = model.embed(token_ids.unsqueeze(1))  # [B, 1, E]
    rope = model.rope(positions.unsqueeze(1))
    for layer, block in enumerate(model.blocks):
        q, k, v = block.project(hidden, rope)
        block.finish_(hidden, attend(layer, q, k, v))
    return model.head(hidden[:, -1])
