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
from fastkv.models.granite import Multipliers
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
        sliding_windows=(),
        family_settings=None,
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
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)


def test_qwen2_defaults(read: Read) -> None:
    config = read(architectures=["Qwen2ForCausalLM"], num_attention_heads=32)
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (32, 2, 32_768)
    assert config.sliding_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)


def test_qwen3_defaults(read: Read) -> None:
    config = read(architectures=["Qwen3ForCausalLM"], num_attention_heads=32)
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (32, 128, 32_768)
    assert config.sliding_windows == (None,) * 4
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)


def test_olmo2_defaults(read: Read) -> None:
    config = read(architectures=["Olmo2ForCausalLM"])
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (8, 8, 2048)
    assert config.rms_norm_eps == 1e-5
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert config.sliding_windows == ()


def test_granite_defaults(read: Read) -> None:
    config = read(architectures=["GraniteForCausalLM"])
    assert (config.n_kv_heads, config.head_dim, config.context_length) == (8, 8, 2048)
    assert config.family_settings == Multipliers(embedding=1.0, attention=1.0, residual=1.0, logits=1.0)


@pytest.mark.parametrize("stated", [GONE, None, []], ids=["absent", "null", "empty"])
@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("ministral", "M"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
        ("olmo2", "Olmo2"),
        ("granite", "Granite"),
    ],
)
def test_model_type_decides_where_no_architecture_is_stated(
    read: Read, model_type: str, family: str, stated: Any
) -> None:
    config = read(architectures=stated, model_type=model_type, num_key_value_heads=2)
    assert config.architecture.startswith(family)
    assert config.qkv_bias == (family == "Qwen2")


def test_the_architecture_wins_over_the_model_type(read: Read) -> None:
    config = read(architectures=["Qwen2ForCausalLM"], model_type="llama", num_key_value_heads=2)
    assert config.architecture == "Qwen2ForCausalLM"
    assert config.qkv_bias


def test_nulls_mean_absent(read: Read) -> None:
    optional = (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "torch_dtype",
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "quantization_config",
    )
    assert read(**dict.fromkeys(optional)) == read()


def test_switches_reach_the_config(read: Read) -> None:
    config = read(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=5e5)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5
    assert config.rope == RopeConfig(theta=500_000.0)


@pytest.mark.parametrize("theta", [3_580_165_449.0, 45_900_000_000.0])
def test_thetas_of_very_long_contexts(read: Read, theta: float) -> None:
    """Published Llama 3 models of 1 and 4 million tokens have thetas beyond 32 bits: no bound may refuse them."""
    assert read(rope_theta=theta, max_position_embeddings=4_194_304).rope.theta == theta


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "MinistralForCausalLM", "Qwen2ForCausalLM"])
def test_families_without_the_switch_ignore_attention_bias(read: Read, architecture: str) -> None:
    """transformers' classes of these families have no such setting: what a stray key says changes nothing."""
    stray = read(architectures=[architecture], num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    assert stray == read(architectures=[architecture], num_key_value_heads=2)


def test_olmo2_has_no_switch_for_biases_of_the_mlp(read: Read) -> None:
    config = read(architectures=["Olmo2ForCausalLM"], attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)


def test_keys_that_nobody_knows_are_no_mistake(read: Read) -> None:
    extra = {"pretraining_tp": 1, "use_cache": True, "_name_or_path": "x", "transformers_version": "4.40.0"}
    assert read(**extra) == read()


# --- what is refused ---

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown-architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    ),
    "no-causal-head": ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification",)),
    "mixture-of-experts": ({"architectures": ["Qwen3MoeForCausalLM"]}, ("Qwen3MoeForCausalLM",)),
    "unknown-model-type": ({"architectures": GONE, "model_type": "gpt2"}, ("gpt2", "LlamaForCausalLM")),
    "nothing-stated": ({"architectures": GONE, "model_type": GONE}, ("none stated", "LlamaForCausalLM")),
    "architectures-is-a-string": ({"architectures": "LlamaForCausalLM"}, ("architectures", "list")),
    "architectures-holds-a-number": ({"architectures": [1]}, ("architectures", "list")),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantization_config", "quantised")),
    "gelu": ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
    "gelu-in-another-family": (
        {"architectures": ["Olmo2ForCausalLM"], "hidden_act": "gelu"},
        ("hidden_act", "gelu", "silu"),
    ),
    "multiplier-zero": (
        {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0},
        ("residual_multiplier", "0"),
    ),
    "multiplier-text": (
        {"architectures": ["GraniteForCausalLM"], "logits_scaling": "16"},
        ("logits_scaling", "'16'"),
    ),
    "hidden-act-is-a-list": ({"hidden_act": ["silu"]}, ("hidden_act",)),
    "partial-rotation": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
    "partial-rotation-inside": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ("rope_parameters", "partial_rotary_factor"),
    ),
    "rope-dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope_scaling", "dynamic", *SCALINGS)),
    "rope-longrope": ({"rope_scaling": {"rope_type": "longrope"}}, ("rope_scaling", "longrope")),
    "rope-type-is-a-number": ({"rope_scaling": {"rope_type": 3}}, ("rope_scaling", "3")),
    "rope-type-is-a-list": ({"rope_scaling": {"rope_type": ["yarn"]}}, ("rope_scaling", "yarn")),
    "rope-scaling-is-a-string": ({"rope_scaling": "yarn"}, ("rope_scaling", "object")),
    "rope-parameters-is-a-list": ({"rope_parameters": [YARN]}, ("rope_parameters", "object")),
    "rope-by-layer-type": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_type": "default"},
            }
        },
        ("rope_parameters", "per layer type"),
    ),
    "linear-without-factor": ({"rope_scaling": {"rope_type": "linear"}}, ("rope_scaling", "factor", "missing")),
    "linear-factor-null": ({"rope_scaling": {"rope_type": "linear", "factor": None}}, ("rope_scaling", "factor")),
    "linear-factor-zero": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ("rope_scaling", "factor", "0")),
    "linear-factor-text": ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ("rope_scaling", "factor", "'2'")),
    "llama3-without-factor": ({"rope_scaling": {**LLAMA3, "factor": None}}, ("rope_scaling", "factor")),
    "llama3-without-low": ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, ("rope_scaling", "low_freq_factor")),
    "llama3-without-high": (
        {"rope_scaling": {**LLAMA3, "high_freq_factor": None}},
        ("rope_scaling", "high_freq_factor"),
    ),
    "llama3-empty-band": ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ("rope_scaling", "high_freq_factor")),
    "yarn-negative-factor": ({"rope_scaling": {**YARN, "factor": -2.0}}, ("rope_scaling", "factor", "-2.0")),
    "yarn-truncate-text": ({"rope_scaling": {**YARN, "truncate": "no"}}, ("rope_scaling", "truncate")),
    "yarn-original-float": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 1024.0}},
        ("rope_scaling", "original_max_position_embeddings"),
    ),
    "yarn-mscale-text": ({"rope_scaling": {**YARN, "mscale": "1"}}, ("rope_scaling", "mscale")),
    "theta-zero": ({"rope_theta": 0}, ("rope_theta",)),
    "theta-text": ({"rope_theta": "10000"}, ("rope_theta", "'10000'")),
    "theta-nan": ({"rope_theta": float("nan")}, ("rope_theta", "nan")),
    "theta-infinite": ({"rope_theta": float("inf")}, ("rope_theta", "inf")),
    "theta-true": ({"rope_theta": True}, ("rope_theta", "True")),
    "eps-zero": ({"rms_norm_eps": 0}, ("rms_norm_eps",)),
    "eps-beyond-floats": ({"rms_norm_eps": 10**400}, ("rms_norm_eps",)),
    "yarn-factor-beyond-reason": (
        {"rope_scaling": {**YARN, "factor": 1e308}, "max_position_embeddings": 10**6},
        ("rope_scaling", "factor", "1e+308"),
    ),
    "yarn-theta-one": ({"rope_theta": 1.0, "rope_scaling": YARN}, ("rope_theta", "1.0")),
    "size-beyond-integers": ({"hidden_size": 10**30}, ("hidden_size", "1" + "0" * 30)),
    "size-beyond-reason": ({"vocab_size": 2**62}, ("vocab_size", str(2**62))),
    "sizes-as-text": ({"hidden_size": "64"}, ("hidden_size", "'64'")),
    "sizes-as-float": ({"intermediate_size": 80.0}, ("intermediate_size", "80.0")),
    "sizes-as-bool": ({"vocab_size": True}, ("vocab_size", "True")),
    "no-layers": ({"num_hidden_layers": 0}, ("num_hidden_layers", "at least 1")),
    "negative-heads": ({"num_attention_heads": -8}, ("num_attention_heads", "-8")),
    "zero-kv-heads": ({"num_key_value_heads": 0}, ("num_key_value_heads", "0")),
    "zero-head-dim": ({"head_dim": 0}, ("head_dim", "0")),
    "zero-context": ({"max_position_embeddings": 0}, ("max_position_embeddings", "0")),
    "heads-not-divisible": ({"num_key_value_heads": 3}, ("num_key_value_heads", "divisor", "8", "3")),
    "more-kv-heads-than-heads": ({"num_key_value_heads": 16}, ("num_key_value_heads", "divisor", "16")),
    "odd-head-dim": ({"head_dim": 7}, ("head_dim", "even", "7")),
    "tie-as-text": ({"tie_word_embeddings": "true"}, ("tie_word_embeddings", "'true'")),
    "bias-as-number": ({"attention_bias": 1}, ("attention_bias", "1")),
    "mlp-bias-as-number": ({"mlp_bias": 0}, ("mlp_bias", "0")),
    "dtype-int8": ({"dtype": "int8"}, ("dtype", "int8", *DTYPES)),
    "torch-dtype-int8": ({"torch_dtype": "int8"}, ("dtype", "int8", *DTYPES)),
    "dtype-float8": ({"torch_dtype": "float8_e4m3fn"}, ("dtype", "float8_e4m3fn")),
    "dtype-number": ({"torch_dtype": 16}, ("dtype", "16")),
    "eos-text": ({"eos_token_id": "2"}, ("eos_token_id", "'2'")),
    "eos-negative": ({"eos_token_id": -1}, ("eos_token_id", "-1")),
    "eos-list-of-text": ({"eos_token_id": [2, "3"]}, ("eos_token_id", "'3'")),
    "bos-bool": ({"bos_token_id": True}, ("bos_token_id", "True")),
    "window-text": ({"architectures": ["MistralForCausalLM"], "sliding_window": "4096"}, ("sliding_window", "'4096'")),
    "window-zero": ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ("sliding_window", "0")),
    "use-window-text": ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "yes"}, ("use_sliding_window",)),
    "max-window-layers-negative": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": -1},
        ("max_window_layers", "-1"),
    ),
    "layer-types-too-short": (
        {"architectures": ["MinistralForCausalLM"], "layer_types": ["full_attention"]},
        ("layer_types", "4 names"),
    ),
    "layer-types-unknown": (
        {"architectures": ["MinistralForCausalLM"], "layer_types": ["chunked_attention"] * 4},
        ("layer_types", "chunked_attention"),
    ),
    "layer-types-not-a-list": (
        {"architectures": ["MinistralForCausalLM"], "layer_types": "full_attention"},
        ("layer_types", "list"),
    ),
    "layer-types-of-lists": (
        {"architectures": ["MinistralForCausalLM"], "layer_types": [["full_attention"]] * 4},
        ("layer_types", "list"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_file_and_the_key(read: Read, tmp_path: Path, name: str) -> None:
    changes, parts = REFUSED[name]
    _complaint(str(tmp_path / "config.json"), *parts, of=lambda: read(**changes))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
@pytest.mark.parametrize("value", [GONE, None], ids=["absent", "null"])
def test_sizes_must_be_stated(read: Read, tmp_path: Path, key: str, value: Any) -> None:
    _complaint(str(tmp_path / "config.json"), f"'{key}' is missing", of=lambda: read(**{key: value}))


BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("not valid JSON",)),
    "cut-short": (b'{"architectures": ["Llama', ("not valid JSON",)),
    "list": (b"[]", ("expected a JSON object", "list")),
    "null": (b"null", ("expected a JSON object",)),
    "number": (b"7", ("expected a JSON object", "int")),
    "binary": (b"\x80\x02}q\x00.", ("not valid JSON",)),
    "utf-16": ('{"model_type": "llama"}'.encode("utf-16"), ("not valid JSON",)),
    "byte-order-mark": (b"\xef\xbb\xbf{}", ("not valid JSON",)),
    "very-deep": (b"[" * 100_000, ("not valid JSON",)),
    "very-long-number": (b'{"vocab_size": ' + b"9" * 5000 + b"}", ("not valid JSON",)),
    "web-page": (b"<!doctype html>\n<html>\n</html>\n", ("not valid JSON",)),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_broken_json(tmp_path: Path, name: str, file: str) -> None:
    content, parts = BROKEN[name]
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / file).write_bytes(content)
    _complaint(str(tmp_path / file), *parts, of=lambda: ModelConfig.from_pretrained(tmp_path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    expected = (str(tmp_path / "config.json"), "no such file")
    _complaint(*expected, of=lambda: ModelConfig.from_pretrained(tmp_path))
    _complaint(*expected, of=lambda: LLM(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_folder_in_place_of_a_file(tmp_path: Path, file: str) -> None:
    if file != "config.json":
        (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / file).mkdir()
    _complaint(str(tmp_path / file), "cannot be read", of=lambda: ModelConfig.from_pretrained(tmp_path))


def test_a_missing_folder(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "model"
    _complaint(str(missing), "no such folder", of=lambda: ModelConfig.from_pretrained(missing))
    _complaint(str(missing), "no such folder", of=lambda: LLM(missing))
    _complaint(str(missing), "no such folder", of=lambda: LLM(str(missing)))


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    _complaint(str(file), "is a file", "folder", of=lambda: LLM(str(file)))


@pytest.mark.parametrize("name", ["unknown-architecture", "quantised", "gelu", "heads-not-divisible", "dtype-int8"])
def test_the_engine_refuses_a_bad_config_before_it_looks_for_weights(tmp_path: Path, name: str) -> None:
    changes, parts = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    (tmp_path / "model.safetensors").write_bytes(b"never looked at")
    _complaint(str(tmp_path / "config.json"), *parts, of=lambda: LLM(tmp_path, dtype="float32", device="cpu"))


# --- context length ---


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        pytest.param(None, 4096, id="no-scaling"),
        pytest.param({"rope_type": "linear", "factor": 4.0}, 4096, id="linear"),
        pytest.param(LLAMA3, 4096, id="llama3"),
        pytest.param(YARN, 4096, id="yarn-stated-after-stretching"),
        pytest.param({**YARN, "original_max_position_embeddings": 4096}, 16_384, id="yarn-stated-before-stretching"),
        pytest.param({"type": "yarn", "factor": 4.0}, 16_384, id="yarn-original-is-what-is-stated"),
        pytest.param({**YARN, "factor": 2.5, "original_max_position_embeddings": 4095}, 10_237, id="yarn-odd-factor"),
        pytest.param({**YARN, "factor": 2.0}, 4096, id="yarn-factor-says-less"),
        pytest.param({**YARN, "factor": None}, 4096, id="yarn-factor-implied"),
    ],
)
def test_context_length(read: Read, scaling: dict[str, Any] | None, context: int) -> None:
    """max_position_embeddings, or factor x original where yarn says more."""
    assert read(max_position_embeddings=4096, rope_scaling=scaling).context_length == context


def test_yarn_factor_follows_from_the_two_lengths(read: Read) -> None:
    assert read(max_position_embeddings=4096, rope_scaling={**YARN, "factor": None}).rope.factor == 4.0


def test_zero_in_a_yarn_setting_means_unset(read: Read) -> None:
    zeros = {"attention_factor": 0, "mscale": 0, "mscale_all_dim": 0.0}
    assert read(rope_scaling={**YARN, **zeros}).rope == read(rope_scaling=YARN).rope


# --- end of sequence, dtype, windows ---


@pytest.mark.parametrize(
    ("stated", "generation", "eos"),
    [
        pytest.param(2, None, (2,), id="one-id"),
        pytest.param([128_001, 128_009], None, (128_001, 128_009), id="list"),
        pytest.param(GONE, None, (), id="none"),
        pytest.param(2, {"eos_token_id": 7}, (7,), id="generation-config-wins"),
        pytest.param(2, {"eos_token_id": [7, 8]}, (7, 8), id="generation-config-list-wins"),
        pytest.param(2, {"temperature": 0.6}, (2,), id="generation-config-is-silent"),
        pytest.param(2, {"eos_token_id": None}, (2,), id="generation-config-null"),
        pytest.param(GONE, {"eos_token_id": 0}, (0,), id="id-zero"),
    ],
)
def test_end_of_sequence(read: Read, stated: Any, generation: dict[str, Any] | None, eos: tuple[int, ...]) -> None:
    assert read(generation, eos_token_id=stated).eos_token_ids == eos


def test_generation_config_complains_by_its_own_name(read: Read, tmp_path: Path) -> None:
    parts = (str(tmp_path / "generation_config.json"), "eos_token_id", "'</s>'")
    _complaint(*parts, of=lambda: read({"eos_token_id": "</s>"}, eos_token_id=2))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("name", DTYPES)
def test_dtype_under_either_key(read: Read, key: str, name: str) -> None:
    assert read(**{key: name}).dtype == name
    assert read(**{key: f"torch.{name}"}).dtype == name


def test_dtype_wins_over_torch_dtype(read: Read) -> None:
    assert read(dtype="bfloat16", torch_dtype="float32").dtype == "bfloat16"


def test_windows_of_layers(read: Read) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 9}
    assert read(**qwen, use_sliding_window=False).sliding_windows == (None,) * 4
    assert read(**qwen, use_sliding_window=True, max_window_layers=3).sliding_windows == (None, None, None, 9)
    assert read(**qwen, use_sliding_window=True, max_window_layers=0).sliding_windows == (9,) * 4
    assert read(**qwen, use_sliding_window=True, max_window_layers=28).sliding_windows == (None,) * 4
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    mixed = read(**qwen, use_sliding_window=True, layer_types=kinds, max_window_layers=0)
    assert mixed.sliding_windows == (None, 9, None, 9)
    assert mixed.sliding_window == 9
    assert [mixed.windows[layer] for layer in range(4)] == [None, 9, None, 9]
    assert mixed.windows == (None, 9, None, 9)
    assert read().windows == (None,) * 4


def test_no_window_is_none_everywhere(read: Read) -> None:
    config = read(architectures=["MistralForCausalLM"], sliding_window=None)
    assert config.sliding_window is None
    assert config.windows[3] is None
    assert read().sliding_window is None  # a family that has none at all
    assert read().windows[3] is None


def test_config_is_frozen(read: Read) -> None:
    config = read()
    with pytest.raises(AttributeError):
        config.n_layers = 5  # type: ignore[misc]


# --- published configurations ---
# The keys that matter of each file, the fields that must come of them, and the number of parameters that the model's
# authors state, which no wrong size would give.

NORMS = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    **NORMS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MINISTRAL_8B = {
    **MISTRAL_7B,
    "head_dim": 128,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "rope_theta": 100_000_000.0,
    "sliding_window": 32_768,
    "vocab_size": 131_072,
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "Llama-2-7B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **NORMS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "torch_dtype": "float16",
            "vocab_size": 32_000,
        },
        {
            "n_kv_heads": 32,
            "head_dim": 128,
            "context_length": 4096,
            "rope": RopeConfig(10_000.0),
            "dtype": "float16",
            "sliding_window": None,
            "eos_token_ids": (2,),
        },
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **NORMS,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "max_position_embeddings": 131_072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_scaling": LLAMA_31_ROPE,
            "rope_theta": 500_000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 128_256,
        },
        {
            "n_kv_heads": 8,
            "head_dim": 128,
            "context_length": 131_072,
            "rope": RopeConfig(500_000.0, "llama3", 8.0, 8192, 1.0, 4.0),
            "bos_token_id": 128_000,
            "eos_token_ids": (128_001, 128_008, 128_009),
            "dtype": "bfloat16",
        },
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **NORMS,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131_072,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rope_scaling": {**LLAMA_31_ROPE, "factor": 32.0},
            "rope_theta": 500_000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 128_256,
        },
        {
            "n_layers": 16,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope": RopeConfig(500_000.0, "llama3", 32.0, 8192, 1.0, 4.0),
        },
        1_235_814_400,
    ),
    "TinyLlama-1.1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **NORMS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
            "rope_scaling": None,
            "torch_dtype": "float32",
            "vocab_size": 32_000,
        },
        {"n_kv_heads": 4, "head_dim": 64, "context_length": 2048, "rms_norm_eps": 1e-5, "dtype": "float32"},
        1_100_048_384,
    ),
    "SmolLM2-135M": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **NORMS,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100_000,
            "torch_dtype": "bfloat16",
            "vocab_size": 49_152,
        },
        {
            "n_heads": 9,
            "n_kv_heads": 3,
            "head_dim": 64,
            "rope": RopeConfig(100_000.0),
            "bos_token_id": 0,
            "eos_token_ids": (0,),
        },
        134_515_008,
    ),
    "Mistral-7B-v0.1": (
        {**MISTRAL_7B, "rope_theta": 10_000.0, "sliding_window": 4096, "vocab_size": 32_000},
        {
            "sliding_window": 4096,
            "sliding_windows": (4096,) * 32,
            "context_length": 32_768,
            "head_dim": 128,
            "rope": RopeConfig(10_000.0),
        },
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        {**MISTRAL_7B, "rope_theta": 1_000_000.0, "sliding_window": None, "vocab_size": 32_768},
        {"sliding_window": None, "context_length": 32_768, "rope": RopeConfig(1_000_000.0)},
        7_248_023_552,
    ),
    "Mistral-Nemo-12B": (
        {
            **MISTRAL_7B,
            "head_dim": 128,
            "hidden_size": 5120,
            "max_position_embeddings": 128_000,
            "num_hidden_layers": 40,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "vocab_size": 131_072,
        },
        {"head_dim": 128, "n_layers": 40, "context_length": 128_000, "sliding_window": None},
        12_247_782_400,
    ),
    "Ministral-8B": (
        MINISTRAL_8B,
        {"sliding_window": 32_768, "context_length": 32_768, "n_layers": 36, "rope": RopeConfig(100_000_000.0)},
        8_019_808_256,
    ),
    "Ministral-8B-alternating": (
        {
            **MINISTRAL_8B,
            "architectures": ["MinistralForCausalLM"],
            "model_type": "ministral",
            "max_position_embeddings": 131_072,
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 9,
        },
        {
            "architecture": "MinistralForCausalLM",
            "sliding_windows": (None, 32_768, 32_768, 32_768) * 9,
            "context_length": 131_072,
        },
        8_019_808_256,
    ),
    "Qwen2.5-7B-with-yarn": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **NORMS,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "max_position_embeddings": 32_768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32_768, "type": "yarn"},
            "rope_theta": 1_000_000.0,
            "sliding_window": 131_072,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 152_064,
        },
        {
            "qkv_bias": True,
            "o_bias": False,
            "head_dim": 128,
            "context_length": 131_072,
            "sliding_window": None,
            "rope": RopeConfig(1_000_000.0, "yarn", 4.0, 32_768),
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **NORMS,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "max_position_embeddings": 40_960,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1_000_000,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
        {
            "qkv_bias": False,
            "head_dim": 128,
            "context_length": 40_960,
            "sliding_window": None,
            "rope": RopeConfig(1_000_000.0),
        },
        8_190_735_360,
    ),
    "OLMo-2-7B": (
        {
            "architectures": ["Olmo2ForCausalLM"],
            "model_type": "olmo2",
            **NORMS,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "eos_token_id": 100_257,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pad_token_id": 100_277,
            "rope_scaling": None,
            "rope_theta": 500_000,
            "torch_dtype": "float32",
            "vocab_size": 100_352,
        },
        {
            "n_kv_heads": 32,
            "head_dim": 128,
            "context_length": 4096,
            "rope": RopeConfig(500_000.0),
            "dtype": "float32",
            "family_settings": None,
        },
        7_298_617_344,
    ),
    "Granite-3.0-8B": (
        {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            **NORMS,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_multiplier": 0.0078125,
            "bos_token_id": 0,
            "embedding_multiplier": 12.0,
            "eos_token_id": 0,
            "hidden_size": 4096,
            "intermediate_size": 12_800,
            "logits_scaling": 16.0,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "residual_multiplier": 0.22,
            "rope_scaling": None,
            "rope_theta": 10_000,
            "torch_dtype": "bfloat16",
            "vocab_size": 49_155,
        },
        {
            "head_dim": 128,
            "tie_word_embeddings": True,
            "family_settings": Multipliers(embedding=12.0, attention=1 / 128, residual=0.22, logits=16.0),
            "eos_token_ids": (0,),
        },
        8_170_848_256,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration(tmp_path: Path, name: str) -> None:
    values, expected, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = ModelConfig.from_pretrained(tmp_path)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.architecture == values["architectures"][0]
    assert config.vocab_size == values["vocab_size"]
    assert config.hidden_size == values["hidden_size"]
    assert config.intermediate_size == values["intermediate_size"]
    assert config.n_layers == values["num_hidden_layers"]
    assert config.n_heads == values["num_attention_heads"]
    assert config.n_kv_heads == values["num_key_value_heads"]
    assert config.rms_norm_eps == values["rms_norm_eps"]
    assert model_bytes(config, torch.bfloat16) == 2 * parameters
