"""ModelConfig: everything the engine needs to know of a model, read from config.json in this one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError
from fastkv.models import mistral, qwen2, qwen3
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.rope_config import RopeConfig, read_rope

DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 10_000  # each is built before the sizes are known; the deepest published models have some hundred

LLAMA = Family({"llama": "LlamaForCausalLM"}, lambda fields: {}, context_length=2048)
FAMILIES = (LLAMA, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder.

    `context_length` is in tokens. `sliding_windows` holds one entry a layer: the number of tokens that a query sees,
    itself included, or None for all of them. `dtype` is the checkpoint's, None where config.json does not say.
    `eos_token_ids` are the ids that end a text by config.json and generation_config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer, in tokens, or None if every layer sees everything."""
        windows = [window for window in self.sliding_windows if window is not None]
        return min(windows) if windows else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, in tokens, or None."""
        return self.sliding_windows or (None,) * self.n_layers

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer, in tokens, or None."""
        return self.sliding_windows[layer] if self.sliding_windows else None

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
        family, architecture = _find_family(fields)
        _reject_unsupported(fields)
        n_heads = fields.integer("num_attention_heads")
        hidden_size = fields.integer("hidden_size")
        context = fields.integer("max_position_embeddings", family.context_length)
        rope = read_rope(fields, context)
        attention_bias = fields.flag("attention_bias", False)
        settings: dict[str, Any] = {
            "architecture": architecture,
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": fields.integer("intermediate_size"),
            "n_layers": fields.integer("num_hidden_layers"),
            "n_heads": n_heads,
            "n_kv_heads": fields.integer("num_key_value_heads", _default_kv_heads(fields, family, n_heads)),
            "head_dim": fields.integer("head_dim", family.head_dim or max(1, hidden_size // n_heads)),
            "context_length": _context_length(fields, context, rope),
            "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
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
        return cls(**settings)


def _find_family(fields: Fields) -> tuple[Family, str]:
    names = fields.get("architectures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.complain("architectures", "a list of names")
    for family in FAMILIES:
        for model_type, name in family.architectures.items():
            if name in names or (not names and fields.get("model_type", None) == model_type):
                return family, name
    supported = ", ".join(name for family in FAMILIES for name in family.architectures.values())
    stated = ", ".join(names) or fields.get("model_type", "none stated")
    raise FastKVError(f"{fields.source}: architecture {stated} is not supported; supported are {supported}")


def _reject_unsupported(fields: Fields) -> None:
    if "quantization_config" in fields:
        raise FastKVError(
            f"{fields.source}: the checkpoint is quantised (quantization_config), which is not supported; "
            "use the float16, bfloat16 or float32 weights of the same model"
        )
    activation = fields.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise FastKVError(f"{fields.source}: hidden_act {activation!r} is not supported (only silu)")


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
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise FastKVError(f"{fields.source}: dtype {name!r} is not supported; known are {', '.join(DTYPES)}")
    return name


def _check_heads(fields: Fields, settings: dict[str, Any]) -> None:
    if settings["n_heads"] % settings["n_kv_heads"]:
        raise fields.complain("num_key_value_heads", f"a divisor of num_attention_heads ({settings['n_heads']})")
    if settings["head_dim"] % 2:
        raise fields.complain("head_dim", "even (the rotary embedding turns pairs)")
