"""One decode step, eagerly: a token in, the next token's logits out, one more entry in every layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.ragged import RaggedKVCache
from fastkv.engine.attention import decode_attention
from fastkv.models.llama import Llama

# (layer, q [B, Hq, 1, D], k and v [B, Hkv, 1, D]) -> [B, Hq, 1, D]: keeps k and v, and attends to all that is kept
AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def decode_step(model: Llama, caches: Sequence[KVCache], token_ids: Tensor) -> Tensor:
    """token_ids int64 [B] -> logits float32 [B, V], the B texts being those of the caches in their order.

    Weights are read once for all of them; each cache is attended to on its own, as long as it is. A token's position is
    the length of its text so far, however few entries the cache holds.
    Raises FastKVError when a cache or the context is full; nothing has changed then.
    """
    for cache in caches:
        cache.check_room()
    sizes = [cache.batch for cache in caches]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(caches) == 1:
            return _attend_one(model, layer, caches[0], q, k, v)
        parts = (tensor.split(sizes) for tensor in (q, k, v))
        return torch.cat([_attend_one(model, layer, cache, *part) for cache, *part in zip(caches, *parts, strict=True)])

    logits = one_token(model, token_ids, torch.cat([cache.next_position for cache in caches]), attend)
    for cache in caches:
        cache.advance()
    return logits


def _attend_one(model: Llama, layer: int, cache: KVCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The new tokens of one cache's texts attend to what it has kept, and to themselves."""
    if isinstance(cache, RaggedKVCache):
        return _attend_heads(q, cache.append_to_heads(layer, k, v))
    keys, values = cache.append(layer, k, v)
    window = model.config.window_of(layer)
    if window is not None:
        # Entries are the last positions in order here: a policy that drops any is refused beyond the window.
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    return decode_attention(q, keys, values)


def _attend_heads(q: Tensor, heads: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """q [B, Hq, 1, D], each KV head on its own, as long as it is.

    No sliding window is looked at: a policy that drops tokens ends where the window does.
    """
    grouped = q.unflatten(1, (len(heads[0]), -1))  # [B, Hkv, G, 1, D]
    texts = [
        torch.cat([decode_attention(group[None], k, v) for group, (k, v) in zip(groups, kept, strict=True)], dim=1)
        for groups, kept in zip(grouped, heads, strict=True)
    ]
    return torch.cat(texts)


def one_token(model: Llama, token_ids: Tensor, positions: Tensor, attend: AttendLayer) -> Tensor:
    """The layers for one token of each text: token_ids and positions int64 [B] -> logits float32 [B, V]."""
    hidden = model.embed(token_ids.unsqueeze(1))  # [B, 1, E]
    rope = model.rope(positions.unsqueeze(1))
    for layer, block in enumerate(model.blocks):
        q, k, v = block.project(hidden, rope)
        block.finish_(hidden, attend(layer, q, k, v))
    return model.head(hidden[:, -1])
