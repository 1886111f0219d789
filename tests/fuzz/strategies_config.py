"""Changes to config.json and generation_config.json: every key that is read, with values that fit and that do not."""

from __future__ import annotations

from typing import Any

from fuzz.base_folders import FAMILIES
from fuzz.edits import Edit, Put, PutSomewhere
from fuzz.strategies_values import integers, mostly, numbers, scalars, values
from hypothesis import strategies as st

KEYS = [
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "quantization_config",
    "partial_rotary_factor",
    "rope_theta",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "original_max_position_embeddings",
]
ROPE_NUMBERS = [
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "partial_rotary_factor",
]
SCALINGS = ["default", "linear", "llama3", "yarn", "dynamic", "longrope", "su", "mrope"]


def config_edits() -> st.SearchStrategy[Edit]:
    config = st.just("config.json")
    anything = st.builds(Put, config, st.tuples(st.sampled_from(KEYS)), values())
    sizes = st.builds(Put, config, st.tuples(st.sampled_from(KEYS)), integers() | numbers())
    families = st.builds(
        Put, config, st.just(("architectures",)), st.lists(st.sampled_from(list(FAMILIES)), max_size=2)
    )
    windows = st.builds(Put, config, st.just(("layer_types",)), st.lists(_kinds(), min_size=1, max_size=3))
    rope = st.builds(Put, config, st.tuples(st.sampled_from(["rope_scaling", "rope_parameters"])), _rope())
    return (
        anything
        | sizes
        | families
        | windows
        | rope
        | rope
        | _ends()
        | st.builds(PutSomewhere, config, st.integers(0, 40), values())
    )


def _kinds() -> st.SearchStrategy[Any]:
    return st.sampled_from(["full_attention", "sliding_attention"]) | scalars()


def _rope() -> st.SearchStrategy[Any]:
    """A section of rotary settings, of every form, with numbers of every size."""
    sane = st.sampled_from([0.5, 1.0, 2.0, 8.0, 32, 128, 10_000.0])
    number = mostly(sane, numbers() | integers() | scalars())
    kind = st.sampled_from(SCALINGS)
    key = st.sampled_from(["rope_type", "type"])
    whole = st.builds(
        lambda key, kind, numbers, truncate: {key: kind, "factor": 2.0, **numbers, **truncate},
        key,
        kind,
        st.dictionaries(st.sampled_from(ROPE_NUMBERS), number, max_size=6),
        st.just({}) | st.builds(lambda value: {"truncate": value}, scalars()),
    )
    by_layer = st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), whole, max_size=2)
    return mostly(whole, by_layer | values())


def _ends() -> st.SearchStrategy[Edit]:
    file = st.sampled_from(["config.json", "generation_config.json"])
    ids = integers() | st.lists(integers() | scalars(), max_size=3)
    return st.builds(Put, file, st.sampled_from([("eos_token_id",), ("bos_token_id",)]), ids)
