"""What a model family may change about the Llama architecture: one small file per family overrides what differs.

A family is listed in catalogue.py, and nothing else in this folder knows its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fastkv.errors import FastKVError, brief
from fastkv.models.block import Block, PreNormBlock
from fastkv.models.fields import Fields
from fastkv.models.layers import RMSNorm
from fastkv.models.network_config import NetworkConfig
from fastkv.models.rope_config import RopeConfig, read_rope

_LAYER = re.compile(r"layers\.\d+\.")


class Family:
    """How a family of checkpoints is read, built and stored. What is not overridden is as in Llama."""

    # (`model_type`, the name under `architectures`) of config.json
    architectures: tuple[tuple[str, str], ...] = ()

    # --- reading config.json ---

    # What the family's published configuration class assumes where config.json is silent (None: as many KV heads as
    # heads; hidden_size // heads).
    n_kv_heads: int | None = None
    head_dim: int | None = None
    context_length: int = 2048
    rms_norm_eps: float = 1e-6
    # Names under `hidden_act` of the one activation that the family's blocks apply.
    activations: tuple[str, ...] = ("silu", "swish")

    def check(self, fields: Fields) -> None:
        """FastKVError for a setting of config.json that the family's blocks do not follow."""
        activation = fields.get("hidden_act", self.activations[0])
        if activation not in self.activations:
            raise FastKVError(
                f"{fields.source}: hidden_act {brief(activation)} is not supported (only {self.activations[0]})"
            )

    def rope(self, fields: Fields, context_length: int) -> RopeConfig:
        """The (first) rotary embedding that config.json states."""
        return read_rope(fields, context_length)

    def differences(self, fields: Fields) -> dict[str, Any]:
        """The keyword arguments of ModelConfig in which config.json means another thing than in a Llama."""
        return {}

    # --- building the network ---

    def block(self, config: NetworkConfig, layer: int) -> Block:
        """One decoder layer: its norms, attention and MLP."""
        return PreNormBlock(config)

    def rotary_embeddings(self, config: NetworkConfig) -> tuple[RopeConfig, ...]:
        """All rotary embeddings of the model; each block picks one by its index (Attention.rotary)."""
        return (config.rope,)

    # (config, hidden [B, T, E]) -> what the first layer gets of the embeddings; may write into them. None: as they are.
    embedded_: Callable[[NetworkConfig, Tensor], Tensor] | None = None

    def final_norm(self, config: NetworkConfig) -> nn.Module:
        """The norm between the last layer and the head."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps)

    # (config, float32 [..., V]) -> the logits of what the head gives; may write into it. None: as it is.
    logits_: Callable[[NetworkConfig, Tensor], Tensor] | None = None

    # --- where a checkpoint keeps the weights ---

    # Modules of a layer -> the checkpoint's modules, of the same layer, whose rows ours stacks one after another.
    # A module that is not listed has the same name there.
    stored: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "feed_forward.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down_proj": ("mlp.down_proj",),
    }

    def places(self, module: str) -> tuple[str, ...]:
        """The checkpoint's modules that the model's `module` (like `layers.3.self_attn.qkv_proj`) is stacked from."""
        if module == "lm_head":
            return (module,)
        match = _LAYER.match(module)
        layer = match.group() if match else ""
        own = module.removeprefix(layer)
        return tuple(f"model.{layer}{name}" for name in self.stored.get(own, (own,)))
