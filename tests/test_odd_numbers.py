"""config.json with numbers that no model has: each gives finite rotary tables or one line, never a traceback."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.fields import Fields
from fastkv.models.layers import RotaryEmbedding
from fastkv.models.rope_config import RopeConfig
from fastkv.models.rope_frequencies import inverse_frequencies

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "attention_factor": None,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SCALINGS: dict[str, dict[str, Any]] = {"default": {}, "linear": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN}
# Written as they stand, since Python writes some of them otherwise, and refuses to write one of them.
TINY = ("5e-324", "1e-308", "1e-45", "1e-38", "1e-9", "0.5", "1.0000000000000002")
HUGE = ("1e9", "1e38", "1e45", "1e308", "1.7976931348623157e308", "1e999", "1" + "0" * 400, "9" * 5000)
OTHER = ("0", "-0.0", "1", "-1", "-1e308", "NaN", "Infinity", "-Infinity", "2147483647", "2147483648")
ODD = (*TINY, *HUGE, *OTHER)

Read = Callable[[str], ModelConfig | None]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a config.json; None where it is refused, which is done in a line that names the file and is not long."""

    def read_text(text: str) -> ModelConfig | None:
        (tmp_path / "config.json").write_text(text)
        try:
            return ModelConfig.from_pretrained(tmp_path)
        except FastKVError as error:
            said = str(error).removeprefix(str(tmp_path / "config.json"))
            assert said.startswith(":")
            assert len(said) < 400
            return None

    return read_text


def text_of(section: dict[str, Any], theta: str = "10000.0", **changed: str) -> str:
    """A config.json, its rotary section with the given keys changed to what is written here."""
    keys = {**{key: json.dumps(value) for key, value in section.items()}, **changed}
    inside = ", ".join(f'"{key}": {value}' for key, value in keys.items())
    return f'{json.dumps(SMALL)[:-1]}, "rope_theta": {theta}, "rope_scaling": {{{inside}}}}}'


def assert_finite(config: ModelConfig) -> None:
    assert inverse_frequencies(config.rope, config.head_dim).isfinite().all()
    angles = (config.context_length - 1) * inverse_frequencies(config.rope, config.head_dim)
    scale = RotaryEmbedding(config.rope, config.head_dim).scale
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (angles.cos() * scale).to(dtype).isfinite().all()
        assert (angles.sin() * scale).to(dtype).isfinite().all()


KEYS = [(name, key) for name, section in SCALINGS.items() for key in ("rope_theta", *section)]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_odd_numbers_of_a_rotary_section(read: Read, name: str, key: str) -> None:
    section = {"rope_type": name, **SCALINGS[name]}
    accepted = 0
    for odd in ODD:
        config = read(text_of(section, **{key: odd}))
        if config is not None:
            assert_finite(config)
            accepted += 1
    assert 0 < accepted < len(ODD)


@pytest.mark.parametrize("name", SCALINGS)
def test_odd_numbers_all_at_once(read: Read, name: str) -> None:
    for theta in ("1.5", "10000.0", "1e308"):
        for odd in ODD:
            changed = {key: odd for key in SCALINGS[name] if key != "original_max_position_embeddings"}
            config = read(text_of({"rope_type": name, **SCALINGS[name]}, theta, **changed))
            if config is not None:
                assert_finite(config)


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow"])
def test_zero_for_a_bound_of_yarn_is_the_usual_one(read: Read, key: str) -> None:
    """As in transformers, where a zero is no number of turns."""
    section = {"rope_type": "yarn", **YARN}
    usual, zero = read(text_of(section)), read(text_of(section, **{key: "0"}))
    assert usual is not None
    assert zero == usual


@pytest.mark.parametrize(("fast", "slow"), [(1.0, 32.0), (1e-9, 32.0), (1e9, 1e8), (2.0, 2.0)])
@pytest.mark.parametrize("truncate", [True, False])
def test_bounds_of_yarn_in_any_order_are_as_in_transformers(fast: float, slow: float, truncate: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    section = {"rope_type": "yarn", "rope_theta": 10_000.0, **YARN, "attention_factor": 1.0, "truncate": truncate}
    theirs = LlamaConfig(**SMALL, rope_parameters={**section, "beta_fast": fast, "beta_slow": slow})
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = RopeConfig(10_000.0, "yarn", 4.0, 1024, beta_fast=fast, beta_slow=slow, truncate=truncate)
    torch.testing.assert_close(inverse_frequencies(ours, 8), expected)


NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "partial_rotary_factor", "sliding_window", "max_window_layers"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("bos_token_id", "eos_token_id"),
)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite"])
def test_odd_numbers_anywhere(read: Read, architecture: str) -> None:
    values = {**SMALL, "architectures": [f"{architecture}ForCausalLM"], "use_sliding_window": True}
    values["num_key_value_heads"] = 2
    for key in NUMBERS:
        others = json.dumps({name: value for name, value in values.items() if name != key})
        for odd in ODD[::3]:
            config = read(f'{others[:-1]}, "{key}": {odd}}}')
            if config is not None:
                assert_finite(config)


# --- JSON itself ---


def test_a_number_of_very_many_digits_is_told_by_its_length(tmp_path: Path) -> None:
    """Python's own complaint advises how to change Python."""
    (tmp_path / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    with pytest.raises(FastKVError, match=r"config\.json: not valid JSON \(a number of 5000 digits\)"):
        ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("depth", [1, 100, 900, 1000, 5000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_act", "architectures", "rope_scaling", "dtype", "unknown"])
def test_deep_nesting(read: Read, depth: int, brackets: str, key: str) -> None:
    """What can be read may still be too deep to be printed."""
    opening = brackets[0] if brackets == "[]" else '{"a": '
    nested = opening * depth + "1" + brackets[1] * depth
    config = read(f'{json.dumps(SMALL)[:-1]}, "{key}": {nested}}}')
    assert config is None or (depth < 5000 and (key == "unknown" or (key == "rope_scaling" and depth == 1)))


def test_the_last_of_two_equal_keys_holds(read: Read) -> None:
    """As for every reader of these files."""
    config = read(f'{json.dumps(SMALL)[:-1]}, "vocab_size": 7, "vocab_size": 8}}')
    assert config is not None
    assert config.vocab_size == 8


@pytest.mark.parametrize("key", [*SMALL, "dtype", "hidden_act", "rope_theta", "rope_scaling", "model_type"])
@pytest.mark.parametrize("kind", ["text", "texts", "numbers", "object"])
def test_a_huge_value_is_not_repeated(read: Read, key: str, kind: str) -> None:
    text = "x" * 10**6
    values = {**SMALL, key: {"text": text, "texts": [text], "numbers": [1] * 10**5, "object": {"type": text}}[kind]}
    if key == "model_type":
        del values["architectures"]
    assert read(json.dumps(values)) is None


def test_a_huge_value_is_not_printed_on_the_way() -> None:
    """Ten million characters are not copied, quoted or searched to make a line of a hundred."""
    fields = Fields({"key": "x" * 10**7}, "file")
    tracemalloc.start()
    try:
        error = fields.complain("key", "a whole number")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "not 'xxx" in str(error)
    assert peak < 100_000
