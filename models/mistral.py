"""Mistral, Ministral and Nemo: no biases, and a sliding window unless config.json says null."""

from __future__ import annotations

from typing import Any

from fastkv.models.family import Family, layer_windows
from fastkv.models.fields import Fields


def _differences(fields: Fields) -> dict[str, Any]:
    # The published class assumes a window of 4096 where the key is absent; an explicit null means none.
    stated = "sliding_window" in fields.values and "sliding_window" not in fields
    window = None if stated else fields.integer("sliding_window", 4096)
    return {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "sliding_windows": layer_windows(fields, window)}


FAMILY = Family(
    "mistral",
    ("MistralForCausalLM", "MinistralForCausalLM"),
    _differences,
    n_kv_heads=8,
    context_length=131_072,
)
