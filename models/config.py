"""ModelConfig: everything the engine needs to know of a model, read from config.json in this one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError, brief
from fastkv.models.catalogue import find_family
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.network_config import NetworkConfig
from fastkv.models.rope_config import RopeConfig
from fastkv.models.rope_frequencies import is_finite

DTYPES = ("float32", "bfloat16", "float16")
STORED_DTYPES = (*DTYPES, "float64")  # float64 is read, but nothing is computed in it
# What is refused whatever the weights say, since random weights say nothing: time and memory go with it. The deepest
# published models have some hundred layers, the widest heads some hundred values.
MAX_LAYERS = 1000
MAX_HEAD_DIM = 2**16


@dataclass(frozen=True)
class ModelConfig(NetworkConfig):
    """A supported decoder: its network, and what else its folder says.

    `dtype` is the checkpoint's, None where config.json does not say. `eos_token_ids` are the ids that end a sequence,
    by config.json and generation_config.json.
    """

    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` (and the EOS ids of `generation_config.json`) of a local model folder.

        Raises FastKVError for a missing or broken file, an unsupported architecture, or a quantised checkpoint.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FastKVError(f"{folder}: no such folder; --model takes a folder or a hub id like org/name")
        fields = Fields.read(folder / "config.json")
        if fields.integer("num_hidden_layers") > MAX_LAYERS:
            raise fields.complain("num_hidden_layers", f"at most {MAX_LAYERS}")
        return cls._from_fields(fields, Fields.read_optional(folder / "generation_config.json"))

    @classmethod
    def _from_fields(cls, fields: Fields, generation: Fields) -> ModelConfig:
        family, architecture = find_family(fields)
        _reject_quantised(fields)
        family.check(fields)
        n_heads = fields.integer("num_attention_heads")
        hidden_size = fields.integer("hidden_size")
        context = fields.integer("max_position_embeddings", family.context_length)
        rope = family.rope(fields, context)
        attention_bias = fields.flag("attention_bias", False)
        settings: dict[str, Any] = {
            "architecture": architecture,
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": fields.integer("intermediate_size"),
            "n_layers": fields.integer("num_hidden_layers"),
            "n_heads": n_heads,
            "n_kv_heads": fields.integer("num_key_value_heads", _default_kv_heads(fields, family, n_heads)),
            "head_dim": _head_dim(fields, family.head_dim or max(1, hidden_size // n_heads)),
            "context_length": _context_length(fields, context, rope),
            "rms_norm_eps": fields.number("rms_norm_eps", family.rms_norm_eps),
            "rope": rope,
            "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
            "qkv_bias": attention_bias,
            "o_bias": attention_bias,
            "mlp_bias": fields.flag("mlp_bias", False),
            "dtype": _dtype(fields),
            "bos_token_id": next(iter(fields.token_ids("bos_token_id")), None),
            "eos_token_ids": generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        }
        settings.update(family.differences(fields))
        _check_heads(fields, settings)
        config = cls(**settings)
        if not all(
            is_finite(each, config.head_dim, config.context_length) for each in family.rotary_embeddings(config)
        ):
            raise FastKVError(
                f"{fields.source}: rope_theta and rope_scaling (or rope_parameters) give a rotary embedding that is "
                "not made of finite numbers"
            )
        return config


def _head_dim(fields: Fields, default: int) -> int:
    head_dim = fields.integer("head_dim", default)
    if head_dim > MAX_HEAD_DIM:
        key = "head_dim" if "head_dim" in fields else "head_dim (hidden_size / num_attention_heads)"
        raise FastKVError(f"{fields.source}: {key} must be at most {MAX_HEAD_DIM}, not {head_dim}")
    return head_dim


def _reject_quantised(fields: Fields) -> None:
    if "quantization_config" in fields:
        raise FastKVError(
            f"{fields.source}: the checkpoint is quantised (quantization_config), which is not supported; "
            "use the float16, bfloat16 or float32 weights of the same model"
        )


def _default_kv_heads(fields: Fields, family: Family, n_heads: int) -> int:
    """Where the number is not given: an explicit null means one for each query head, in every family."""
    return n_heads if "num_key_value_heads" in fields.values else family.n_kv_heads or n_heads


def _context_length(fields: Fields, stated: int, rope: RopeConfig) -> int:
    """Yarn checkpoints often state the length before stretching; the longer of the two readings holds."""
    if rope.scaling != "yarn":
        return stated
    stretched = rope.factor * rope.original_context
    if stretched > 2**31:
        raise FastKVError(f"{fields.source}: rope_scaling: factor {rope.factor:g} gives a context beyond reason")
    return max(stated, int(stretched))


def _dtype(fields: Fields) -> str | None:
    dtype = fields.get("dtype", fields.get("torch_dtype", None))
    if dtype is None:
        return None
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in STORED_DTYPES:
        raise FastKVError(
            f"{fields.source}: dtype {brief(name)} is not supported; known are {', '.join(STORED_DTYPES)}"
        )
    return name


def _check_heads(fields: Fields, settings: dict[str, Any]) -> None:
    if settings["n_heads"] % settings["n_kv_heads"]:
        raise fields.complain("num_key_value_heads", f"a divisor of num_attention_heads ({settings['n_heads']})")
    if settings["head_dim"] % 2:
        raise fields.complain("head_dim", "even (the rotary embedding turns pairs)")
