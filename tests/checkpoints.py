"""Small checkpoints, written tensor by tensor under their published names: the loader's own idea of them is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# No two sizes are equal, so that a swapped or transposed one cannot pass.
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}
HEAD = "lm_head.weight"


def shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The published names and shapes of a checkpoint of these settings."""
    size, inner, head = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    queries, keys = values["num_attention_heads"] * head, values["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (values["vocab_size"], size)}
    for layer in range(values["num_hidden_layers"]):
        rows = {
            "self_attn.q_proj": (queries, size),
            "self_attn.k_proj": (keys, size),
            "self_attn.v_proj": (keys, size),
            "self_attn.o_proj": (size, queries),
            "mlp.gate_proj": (inner, size),
            "mlp.up_proj": (inner, size),
            "mlp.down_proj": (size, inner),
            "input_layernorm": (size,),
            "post_attention_layernorm": (size,),
        }
        if values["architectures"] == ["Olmo2ForCausalLM"]:
            del rows["input_layernorm"]
            rows |= {"post_feedforward_layernorm": (size,), "self_attn.q_norm": (queries,), "self_attn.k_norm": (keys,)}
        if values["architectures"] == ["Qwen3ForCausalLM"]:
            rows |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        biased = [name for name in rows if "self_attn" in name and "norm" not in name]
        biased = biased if values.get("attention_bias") else []
        biased = biased[:3] if values["architectures"] == ["Qwen2ForCausalLM"] else biased
        biased += [name for name in rows if "mlp" in name and values.get("mlp_bias")]
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}.weight": shape for name, shape in rows.items()}
        found |= {f"{prefix}{name}.bias": rows[name][:1] for name in biased}
    found["model.norm.weight"] = (size,)
    if not values.get("tie_word_embeddings"):
        found[HEAD] = (values["vocab_size"], size)
    return found


def tensors_of(values: dict[str, Any] = TINY, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(values).items()}


def write_config(folder: Path, values: dict[str, Any] = TINY) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any] = TINY) -> Path:
    save_file(tensors, write_config(folder, values) / SINGLE)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], n_shards: int = 3) -> dict[str, str]:
    """The tensors dealt out over shards, and their index. Returns its weight map."""
    write_config(folder)
    homes = {name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in sorted(set(homes.values())):
        save_file({name: tensors[name] for name, home in homes.items() if home == shard}, folder / shard)
    write_index(folder, homes)
    return homes


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_one_layer(folder: Path, positions: int, window: int) -> None:
    """config.json of a model of one layer and one KV head of 8, with a sliding window, for `load_format="dummy"`."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": positions,
        "sliding_window": window,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
