"""OLMo-2 (arXiv 2501.00656): norms after attention and after the MLP, and RMS norms over all heads of q and of k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkv.kernels.ranks import Across
from fastkv.models.block import Attention, Block, gated_mlp
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.layers import RMSNorm
from fastkv.models.network_config import NetworkConfig


class ProjectionNorm(Across, RMSNorm):
    """RMS norm over all heads of a token together, those of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, T, D] -> [B, H, T, D]."""
        rows = x.transpose(1, 2).flatten(2)  # [B, T, H * D]
        normed = super().forward(rows) if self.ranks is None else self._over_ranks(rows)
        return normed.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)

    def _over_ranks(self, rows: Tensor) -> Tensor:
        """rows [B, T, n] of this rank's heads -> the same, by the mean square of all ranks' values."""
        assert self.ranks is not None
        values = rows.float()
        squares = self.ranks.sum_(values.square().sum(dim=-1, keepdim=True))
        mean = squares / (self.ranks.count * rows.shape[-1])
        return (values * torch.rsqrt(mean + self.eps)).to(rows.dtype) * self.weight


class Olmo2Block(Block):
    """Attention and MLP read the hidden states as they are; what they add is normed."""

    def __init__(self, config: NetworkConfig) -> None:
        eps = config.rms_norm_eps
        q_norm = ProjectionNorm(config.n_heads * config.head_dim, eps)
        k_norm = ProjectionNorm(config.n_kv_heads * config.head_dim, eps)
        super().__init__(Attention(config, q_norm=q_norm, k_norm=k_norm), gated_mlp(config))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps)

    def attention_output(self, attended: Tensor) -> Tensor:
        return self.post_attention_layernorm(super().attention_output(attended))

    def mlp_output(self, hidden: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(super().mlp_output(hidden))


class Olmo2(Family):
    architectures = (("olmo2", "Olmo2ForCausalLM"),)
    rms_norm_eps = 1e-5

    def differences(self, fields: Fields) -> dict[str, Any]:
        return {"mlp_bias": False}

    def block(self, config: NetworkConfig, layer: int) -> Block:
        return Olmo2Block(config)
