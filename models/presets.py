"""Architectures by name, for measuring speed with random weights where no checkpoint is at hand."""

from __future__ import annotations

from dataclasses import replace

from fastkv.models.config import ModelConfig
from fastkv.models.rope_config import RopeConfig

# Random weights were trained for no length: a million tokens can be measured with any of them.
_CONTEXT = 2**20
_LLAMA3_ROPE = RopeConfig(500_000.0, "llama3", 8.0, 8192, 1.0, 4.0)

PRESETS: dict[str, ModelConfig] = {
    "llama-3.1-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        context_length=_CONTEXT,
        rms_norm_eps=1e-5,
        rope=_LLAMA3_ROPE,
        dtype="bfloat16",
    ),
    "llama-3.2-1b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        context_length=_CONTEXT,
        rms_norm_eps=1e-5,
        rope=replace(_LLAMA3_ROPE, factor=32.0),
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "llama-100m": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        n_layers=12,
        n_heads=12,
        n_kv_heads=4,
        head_dim=64,
        context_length=_CONTEXT,
        rms_norm_eps=1e-5,
        rope=RopeConfig(500_000.0),
        dtype="bfloat16",
    ),
}
