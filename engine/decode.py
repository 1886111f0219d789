"""A decode step: new tokens in, logits of the tokens after them out, one entry more for each in every layer's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer_map import Sources
from fastkv.engine.decode_attention import EagerAttention, RecordedAttention, StepAttention
from fastkv.engine.few_reads import FewReads
from fastkv.models.layers import Rope
from fastkv.models.llama import JUDGED, Llama


@torch.inference_mode()
def decode_step(
    model: Llama, cache: KVCache, ids: Tensor, entries: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Append T tokens to each of the B sequences of a cache: ids int64 [B, T] -> logits float32 [B, T, V].

    Tokens attend to all entries that the cache holds, and causally to one another; one token alone to those that the
    cache's reader chooses, where it has one. Their positions follow on the sequence so far, however few entries there
    are. entries: gets k and v [B, Hkv, T, D] of each layer. Raises FastKVError when a cache or the context is full;
    nothing has changed then.
    """
    count = ids.shape[1]
    cache.check_room(count)
    if model.rotary.reserved < cache.position + count:  # the prefill may have been another instance's
        model.reserve(cache.position + count)
    positions = cache.pool.next_position[cache.slots.start : cache.slots.stop].unsqueeze(1)
    if count > 1:
        positions = positions + torch.arange(count, device=ids.device)
    attention: StepAttention
    if cache.reader is not None and count == 1:
        attention = FewReads([cache], model.config.windows)
    else:
        attention = eager = EagerAttention(cache.pool, [cache.slots], count, model.config.windows)
        if entries is not None:
            attention = RecordedAttention(eager, entries)
    logits = run_layers(model, ids, positions, attention)
    cache.advance(count)
    return logits


def run_layers(model: Llama, ids: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
    """All layers for some new tokens: ids and positions int64 [B, T] -> logits float32 [B, T, V]."""
    hidden = model.embed(ids)  # [B, T, E]
    rope = model.rope(positions)
    row = model.row if ids.shape[1] in (1, JUDGED) else None
    if row is not None and isinstance(attention, (EagerAttention, RecordedAttention)) and attention.is_one_row:
        return row.logits(hidden, rope, attention.entries())
    if isinstance(attention, EagerAttention) and attention.shared:
        return _run_sharing(model, hidden, rope, attention, attention.shared)
    if row is not None and ids.numel() == 1:
        return row.logits_around(hidden, rope, attention)
    q, k, v = model.blocks[0].project(hidden, rope)
    last = len(model.blocks) - 1
    for layer in range(last):
        q, k, v = model.between(layer, hidden, attention(layer, q, k, v), rope)
    return model.last(hidden, attention(last, q, k, v))


def _run_sharing(model: Llama, hidden: Tensor, rope: Rope, attention: StepAttention, sources: Sources) -> Tensor:
    """The same where layers read the entries of others: such a layer has queries alone."""
    q, k, v = model.blocks[0].project(hidden, rope)
    for layer, block in enumerate(model.blocks):
        if sources[layer] != layer:
            q = block.project_q(hidden, rope)  # k and v are an earlier layer's, and written nowhere
        elif layer:
            q, k, v = block.project(hidden, rope)
        block.finish_(hidden, attention(layer, q, k, v))
    return model.head(hidden)
