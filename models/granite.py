"""Granite 3: a Llama with four multipliers, of the embeddings, the attention scores, the residuals and the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkv.models.block import Attention, Block, PreNormBlock
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.network_config import NetworkConfig


@dataclass(frozen=True)
class Multipliers:
    """`attention` stands in the place of 1 / sqrt(head_dim); logits are divided by `logits`, the rest is multiplied."""

    embedding: float = 1.0
    attention: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


class GraniteBlock(PreNormBlock):
    """What attention and MLP add is multiplied."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config, Attention(config, scale=_multipliers(config).attention))
        self.residual = _multipliers(config).residual

    def attention_output(self, attended: Tensor) -> Tensor:
        return super().attention_output(attended) * self.residual

    def mlp_output(self, hidden: Tensor) -> Tensor:
        return super().mlp_output(hidden) * self.residual


class Granite(Family):
    architectures = (("granite", "GraniteForCausalLM"),)

    def differences(self, fields: Fields) -> dict[str, Any]:
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        return {"family_settings": Multipliers(*(fields.number(name, 1.0) for name in names))}

    def block(self, config: NetworkConfig, layer: int) -> Block:
        return GraniteBlock(config)

    def embedded_(self, config: NetworkConfig, hidden: Tensor) -> Tensor:
        return hidden.mul_(_multipliers(config).embedding)

    def logits_(self, config: NetworkConfig, logits: Tensor) -> Tensor:
        return logits.div_(_multipliers(config).logits)


def _multipliers(config: NetworkConfig) -> Multipliers:
    settings = config.family_settings
    return settings if isinstance(settings, Multipliers) else Multipliers()
