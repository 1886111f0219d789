"""Layers that read the entries of an earlier one: what can share, and what a prefill holds for them meanwhile."""

from __future__ import annotations

from fastkv.models.llama import Llama


def turn_alike(model: Llama, reader: int, source: int) -> bool:
    """Whether the queries of one layer can meet the keys of the other: both are turned by the same rotary embedding."""
    return model.blocks[reader].self_attn.rotary == model.blocks[source].self_attn.rotary
