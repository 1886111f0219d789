"""Mistral, Ministral and Nemo: no biases, and a sliding window unless config.json says null."""

from __future__ import annotations

from typing import Any

from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.windows import layer_windows, stated_window


class Mistral(Family):
    architectures = (("mistral", "MistralForCausalLM"), ("ministral", "MinistralForCausalLM"))
    n_kv_heads = 8
    context_length = 131_072

    def differences(self, fields: Fields) -> dict[str, Any]:
        windows = layer_windows(fields, stated_window(fields))
        return {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "sliding_windows": windows}
