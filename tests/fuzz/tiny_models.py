"""Tiny models of every family with random weights, sharp enough that a wrong position or window shows."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastkv import LLM

VOCABULARY, CONTEXT = 64, 256
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "MinistralForCausalLM": {},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen3ForCausalLM": {"use_sliding_window": True, "max_window_layers": 1},
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}


@dataclass(frozen=True)
class Model:
    """window: of the families that have one. seed: of the weights."""

    family: str = "LlamaForCausalLM"
    n_layers: int = 3
    n_kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    rope: str = "default"
    window: int | None = None
    biases: bool = False
    tied: bool = False
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.family],
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_kv_heads * self.group,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_scaling": ROPES[self.rope],
            "sliding_window": self.window,
            "attention_bias": self.biases,
            "mlp_bias": self.biases,
            "tie_word_embeddings": self.tied,
            **FAMILIES[self.family],
        }


@lru_cache(maxsize=32)
def load(model: Model) -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model.config))
        llm = LLM(folder, dtype="float32", device="cpu", load_format="dummy")
    generator = torch.Generator().manual_seed(model.seed)
    with torch.no_grad():
        for name, parameter in llm.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * (1.4 if "qkv" in name else 1.0) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + ("norm" in name))
    return llm


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
