"""Qwen3: an RMS norm over each head of q and k before the rotary embedding, and heads of 128 by default."""

from __future__ import annotations

from typing import Any

from fastkv.models.block import Attention, Block, PreNormBlock
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.layers import RMSNorm
from fastkv.models.network_config import NetworkConfig
from fastkv.models.windows import optional_windows


class Qwen3(Family):
    architectures = (("qwen3", "Qwen3ForCausalLM"),)
    n_kv_heads = 32
    head_dim = 128
    context_length = 32_768

    def differences(self, fields: Fields) -> dict[str, Any]:
        return {"mlp_bias": False, "sliding_windows": optional_windows(fields)}

    def block(self, config: NetworkConfig, layer: int) -> Block:
        q_norm, k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))
        return PreNormBlock(config, Attention(config, q_norm=q_norm, k_norm=k_norm))
