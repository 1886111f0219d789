"""Architectures by name, with the sizes of their published config.json: to measure speed with random weights where no
checkpoint is at hand, and to plan (console/plan)."""

from __future__ import annotations

from dataclasses import replace

from fastkv.models.config import ModelConfig
from fastkv.models.rope_config import RopeConfig

# Random weights were trained for no length: a million tokens and an answer can be measured with any of them.
_CONTEXT = 2**21
_LLAMA3_ROPE = RopeConfig(500_000.0, "llama3", 8.0, 8192, 1.0, 4.0)

PRESETS: dict[str, ModelConfig] = {
    "llama-3.1-70b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        context_length=_CONTEXT,
        rms_norm_eps=1e-5,
        rope=_LLAMA3_ROPE,
        dtype="bfloat16",
    ),
    "qwen3-32b": ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151_936,
        hidden_size=5120,
        intermediate_size=25_600,
        n_layers=64,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        context_length=_CONTEXT,
        rms_norm_eps=1e-6,
        rope=RopeConfig(1_000_000.0),
        dtype="bfloat16",
    ),
    "qwen2.5-7b": ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        context_length=_CONTEXT,
        rms_norm_eps=1e-6,
        rope=RopeConfig(1_000_000.0),
        qkv_bias=True,
        dtype="bfloat16",
    ),
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
