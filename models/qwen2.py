"""Qwen2 and Qwen2.5: biases on q, k and v alone, and an optional sliding window in the upper layers."""

from __future__ import annotations

from typing import Any

from fastkv.models.family import Family, optional_windows
from fastkv.models.fields import Fields


def _differences(fields: Fields) -> dict[str, Any]:
    return {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "sliding_windows": optional_windows(fields)}


FAMILY = Family({"qwen2": "Qwen2ForCausalLM"}, _differences, n_kv_heads=32, context_length=32_768)
