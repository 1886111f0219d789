"""Qwen2 and Qwen2.5: biases on q, k and v alone, and an optional sliding window in the upper layers."""

from __future__ import annotations

from typing import Any

from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.windows import optional_windows


class Qwen2(Family):
    architectures = (("qwen2", "Qwen2ForCausalLM"),)
    n_kv_heads = 32
    context_length = 32_768

    def differences(self, fields: Fields) -> dict[str, Any]:
        return {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "sliding_windows": optional_windows(fields)}
