"""One decode step, eagerly: a token in, the next token's logits out, one more entry in every layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.ragged import RaggedKVCache
from fastkv.cache.storage import bucket
from fastkv.engine.attention import decode_attention
from fastkv.models.llama import Llama

# (layer, q [B, Hq, 1, D], k and v [B, Hkv, 1, D]) -> [B, Hq, 1, D]: keeps k and v, and attends to all that is kept
AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_WASTE = 1.25  # slots that may be read for nothing, in relation to those that are live: a call's worth, on a CPU


@torch.inference_mode()
def decode_step(model: Llama, caches: Sequence[KVCache], token_ids: Tensor) -> Tensor:
    """token_ids int64 [B] -> logits float32 [B, V], the B texts being those of the caches in their order.

    Weights are read once for all of them; each cache is attended to as long as it is. A token's position is the length
    of its text so far, however few entries the cache holds.
    Raises FastKVError when a cache or the context is full; nothing has changed then.
    """
    for cache in caches:
        cache.check_room()
    runs = neighbours(caches)
    sizes = [sum(cache.batch for cache in run) for run in runs]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(runs) == 1:
            return _attend_run(model, layer, runs[0], q, k, v)
        parts = (tensor.split(sizes) for tensor in (q, k, v))
        return torch.cat([_attend_run(model, layer, run, *part) for run, *part in zip(runs, *parts, strict=True)])

    logits = one_token(model, token_ids, torch.cat([cache.next_position for cache in caches]), attend)
    for cache in caches:
        cache.advance()
    return logits


def neighbours(caches: Sequence[KVCache]) -> list[list[KVCache]]:
    """The caches in their order, those together whose rows lie side by side."""
    runs: list[list[KVCache]] = []
    for cache in caches:
        if runs and runs[-1][-1].storage.is_followed_by(cache.storage):
            runs[-1].append(cache)
        else:
            runs.append([cache])
    return runs


def _attend_run(model: Llama, layer: int, run: list[KVCache], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In one call for all of them where that reads hardly more than each on its own; else one after the other."""
    if len(run) == 1:
        return _attend_one(model, layer, run[0], q, k, v)
    if _alike(run, layer, model.config.window_of(layer)):
        return _attend_together(layer, run, q, k, v)
    parts = (tensor.split([cache.batch for cache in run]) for tensor in (q, k, v))
    return torch.cat([_attend_one(model, layer, cache, *part) for cache, *part in zip(run, *parts, strict=True)])


def _alike(run: list[KVCache], layer: int, window: int | None) -> bool:
    """Whether the layer's caches are nearly of one length, and what one has less than another was cleared there."""
    if any(cache.ragged for cache in run):
        return False
    lengths = [cache.length(layer) + 1 for cache in run]
    longest = max(lengths)
    cleared = min(bucket(cache.spans[layer]) for cache in run)
    return longest <= min(cleared, window or longest) and longest * len(run) <= _WASTE * sum(lengths)


def _attend_together(layer: int, run: list[KVCache], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `_attend_one`, for neighbours: up to the longest one's length, a mask hides what the others do not have."""
    lengths = [cache.length(layer) + 1 for cache in run for _ in range(cache.batch)]
    for cache, *new in zip(run, *(tensor.split([cache.batch for cache in run]) for tensor in (k, v)), strict=True):
        cache.append(layer, *new)
    storage, first = run[0].storage, run[0].storage.first
    assert storage.whole is not None, "neighbours are rows of one storage"
    rows = slice(first, first + len(lengths))
    keys, values = (buffer[layer][rows, :, : max(lengths)] for buffer in (storage.whole.k, storage.whole.v))
    if min(lengths) == max(lengths):
        return decode_attention(q, keys, values)
    slots = torch.arange(max(lengths), device=q.device)
    visible = slots <= storage.whole.lengths[layer, rows, :1, None, None]  # known to the device: the host need not wait
    return decode_attention(q, keys, values, visible)


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
