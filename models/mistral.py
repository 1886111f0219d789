"""Mistral, Ministral and Nemo: no biases, and a sliding window unless config.json says null."""

from __future__ import annotations

from typing import Any

from fastkv.models.family import Family, layer_windows, stated_window
from fastkv.models.fields import Fields


def _differences(fields: Fields) -> dict[str, Any]:
    windows = layer_windows(fields, stated_window(fields))
    return {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "sliding_windows": windows}


FAMILY = Family(
    {"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"},
    _differences,
    n_kv_heads=8,
    context_length=131_072,
)
