"""Qwen3: an RMS norm over each head of q and k before the rotary embedding, and heads of 128 by default."""

from __future__ import annotations

from typing import Any

from fastkv.models.family import Family, optional_windows
from fastkv.models.fields import Fields


def _differences(fields: Fields) -> dict[str, Any]:
    return {"qk_norm": True, "mlp_bias": False, "sliding_windows": optional_windows(fields)}


FAMILY = Family({"qwen3": "Qwen3ForCausalLM"}, _differences, n_kv_heads=32, head_dim=128, context_length=32_768)
