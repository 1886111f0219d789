"""config.json -> ModelConfig: the defaults of each family, what is refused and how, and published configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv import LLM, FastKVError
from fastkv.models.config import DTYPES, ModelConfig
from fastkv.models.rope_config import SCALINGS, RopeConfig
from fastkv.models.weights import model_bytes

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
GONE = object()  # takes a key out of SMALL

Read = Callable[..., ModelConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads SMALL with the given keys changed, and a generation_config.json where one is given."""

    def read_changed(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
        values = {key: value for key, value in {**SMALL, **changes}.items() if value is not GONE}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_pretrained(tmp_path)

    return read_changed


def _complaint(*parts: str, of: Callable[[], object]) -> None:
    """`of` must raise FastKVError with one line that contains every part."""
    with pytest.raises(FastKVError) as caught:
        of()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- defaults ---


def test_llama_defaults(read: Read) -> None:
    assert read() == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=80,
        n_layers=4,
        n_heads=8,
        n_kv_heads=8,
        head_dim=8,
        context_length=2048,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=10_000.0),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(),
        dtype=None,
        bos_token_id=None,
        eos_token_ids=(),
    )


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "MinistralForCausalLM"])
def test_mistral_defaults(read: Read, architecture: str) -> None:
    config = read(architectures=[architecture])
    assert config.architecture == architecture
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (8, 8, 131_072)
    assert config.sliding_windows == (4096,) * 4
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


def test_qwen2_defaults(read: Read) -> None:
    config = read(architectures=["Qwen2ForCausalLM"], num_attention_heads=32)
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (32, 2, 32_768)
    assert config.sliding_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)


def test_qwen3_defaults(read: Read) -> None:
    config = read(architectures=["Qwen3ForCausalLM"], num_attention_heads=32)
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (32, 128, 32_768)
    assert config.sliding_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, True)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "ministral", "qwen2", "qwen3"])
def test_model_type_decides_where_no_architecture_is_stated(read: Read, model_type: str) -> None:
    for architectures in (GONE, None, []):
        config = read(architectures=architectures, model_type=model_type, num_key_value_heads=2)
        assert config.architecture.lower() in (f"{model_type}forcausallm", "mistralforcausallm"[model_type != "ministral" :])
