"""A model folder as a file that llama.cpp reads (GGUF), in F32 or in Q8_0. Measures nothing.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is made once; its name carries a checksum
of the model's own files, so that no other model finds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkv.console.machine import fingerprint
from fastkv.console.parser import say
from fastkv.errors import FastKVError
from fastkv.models.checkpoint import Checkpoint
from fastkv.models.config import ModelConfig
from fastkv.models.fields import Fields
from fastkv.models.rope_config import RopeConfig
from fastkv.models.rope_frequencies import inverse_frequencies
from fastkv.models.sources import Source, targets
from fastkv.models.stored import StoredNames
from fastkv.models.tying import settled_config
from fastkv.models.weights import meta_model
from fastkv.storage import unwritable

KINDS = ("F32", "Q8_0")
BLOCK = 32  # values of a row that share one scale in Q8_0
_EDITION = 1  # of what is written below: a file of an earlier edition is not taken for one of this

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
_PAIRED = ("llama",)  # whose rotary embedding pairs neighbours (see `pair_neighbours`)
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# How a tokenizer.json cuts a text before it merges -> llama.cpp's name for it. One that is not here gets llama.cpp's
# default: texts may be cut otherwise then, token ids mean the same.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    _WORDS.replace("NUMBER", r"\p{N}{1,3}"): "llama-bpe",
    _WORDS.replace("NUMBER", r"\p{N}"): "qwen2",
    "Digits": "smollm",
    "": "gpt-2",
}

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Tokens:
    """A byte-level BPE vocabulary: every token with its kind (gguf.TokenType), merges "A B", and how texts are cut."""

    texts: list[str]
    kinds: list[int]
    merges: list[str]
    cut: str


def gguf_file(model: Path, kind: str, folder: Path) -> Path:
    """The file in `folder` of the model in the folder `model`, made now if it is not there. kind: one of KINDS.

    Raises FastKVError for a model that this does not convert, and where the file cannot be written.
    """
    path = folder / f"{model.resolve().name}-{fingerprint(model)}-{_EDITION}-{kind}.gguf"
    if path.exists():
        return path
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    say(f"writing {path}, for this and later runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(model, kind, beside)
        os.replace(beside, path)
    except OSError as error:
        raise unwritable(path, error, "gguf_folder") from None
    finally:
        beside.unlink(missing_ok=True)
    return path


def check_convertible(config: ModelConfig) -> None:
    """FastKVError for a model that llama.cpp would not compute as this engine does."""
    if config.architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise FastKVError(f"--model: a GGUF file is made of {known} alone, not of {config.architecture}")
    stretched = config.rope.scaling != "default" and _ARCHITECTURES[config.architecture] not in _PAIRED
    if config.rope.scaling == "yarn" or stretched:
        raise FastKVError(f"--model: no GGUF file of {config.architecture} with {config.rope.scaling} scaling")
    if config.sliding_window is not None:
        raise FastKVError("--model: no GGUF file of a model with sliding windows")


def tensor_name(source: str) -> str:
    """The name in a GGUF file of a checkpoint's tensor."""
    module, _, leaf = source.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    name = _OUTSIDE[module] if layer is None else f"blk.{layer[1]}.{_OF_A_LAYER[layer[2]]}"
    return f"{name}.{leaf}"


def pair_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """The rows [heads * head_dim, ...] of q or k in the order of an engine whose rotary embedding turns neighbours.

    Checkpoints pair value i of a head with value i + head_dim / 2; those two come to stand side by side.
    """
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(rows.shape)


def frequency_divisors(rope: RopeConfig, head_dim: int) -> Tensor:
    """What the scaling divides the frequency of each pair by: float32 [head_dim // 2]."""
    return inverse_frequencies(RopeConfig(rope.theta), head_dim) / inverse_frequencies(rope, head_dim)


def read_tokens(path: Path, vocab_size: int) -> Tokens:
    """The vocabulary of a tokenizer.json, filled up to `vocab_size` tokens. FastKVError unless it is byte-level BPE."""
    from gguf import TokenType

    if not path.is_file():
        raise FastKVError(f"{path}: no such file; llama.cpp needs the model's tokenizer in its GGUF file")
    fields = Fields.read(path)
    model, cutting, decoder = (fields.get(key, {}) for key in ("model", "pre_tokenizer", "decoder"))
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
        raise FastKVError(f"{path}: is no byte-level BPE, the one kind of tokenizer that a GGUF file is made with here")
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    added = [(one["content"], one["id"], one["special"]) for one in fields.get("added_tokens", [])]
    listed = [(text, i, int(TokenType.NORMAL)) for text, i in model["vocab"].items()]
    listed += [(text, i, int(TokenType.CONTROL if special else TokenType.USER_DEFINED)) for text, i, special in added]
    for text, i, kind in listed:
        if i < vocab_size:
            texts[i], kinds[i] = text, kind
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return Tokens(texts, kinds, merges, _cut(cutting))


def _cut(cutting: dict[str, Any]) -> str:
    """llama.cpp's name for a pre-tokenizer."""
    for step in cutting.get("pretokenizers", [cutting]):
        if step.get("type") == "Split":
            return _CUTS.get(step["pattern"].get("Regex"), "default")
        if step.get("type") == "Digits":
            return _CUTS["Digits"]
    return _CUTS[""]


def _write(model: Path, kind: str, path: Path) -> None:
    """Names and sizes of all tensors first, then their values one after the other: no more than one is in memory."""
    from gguf import GGUFWriter

    config = ModelConfig.from_pretrained(model)
    check_convertible(config)
    config = settled_config(config, model, torch.float32)
    sources = [source for target in targets(meta_model(config)) for source in target.sources]
    extra = {} if config.rope.scaling == "default" else {"rope_freqs.weight": _divisors(config)}
    writer = GGUFWriter(path, _ARCHITECTURES[config.architecture])
    try:
        _describe(writer, config, kind, model)
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for source in sources:
            _announce(writer, source, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in (*extra.values(), *_values(model, config, sources, kind)):
            writer.write_tensor_data(values)
    finally:
        writer.close()


def _describe(writer: Any, config: ModelConfig, kind: str, model: Path) -> None:
    """The settings of the network and the tokenizer."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_name(model.resolve().name)
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    tokens = read_tokens(model / "tokenizer.json", config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # which means byte-level BPE
    writer.add_tokenizer_pre(tokens.cut)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.kinds)
    writer.add_token_merges(tokens.merges)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_add_bos_token(False)


def _announce(writer: Any, source: Source, kind: str) -> None:
    """Name, shape and size of a tensor: matrices are of the `kind` asked for, norms and biases always F32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    quantised = kind != "F32" and len(source.shape) == 2
    if quantised and source.shape[1] % BLOCK:
        raise FastKVError(f"--model: {source.name} has rows of {source.shape[1]}, no multiple of {BLOCK} as in {kind}")
    stored = GGMLQuantizationType[kind if quantised else "F32"]
    shape = quant_shape_to_byte_shape(source.shape, stored) if quantised else source.shape
    dtype = np.dtype(np.uint8 if quantised else np.float32)
    writer.add_tensor_info(
        tensor_name(source.name), shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=stored
    )


def _values(model: Path, config: ModelConfig, sources: list[Source], kind: str) -> Iterator[Values]:
    """The values of the tensors, as they are written."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    paired = _ARCHITECTURES[config.architecture] in _PAIRED
    with Checkpoint.open(model) as checkpoint:
        names = StoredNames(checkpoint, config).of(sources)
        for source in sources:
            value = checkpoint.read(names[source.name]).to(torch.float32)
            if paired and re.search(r"\.[qk]_proj\.", source.name):
                value = pair_neighbours(value, config.head_dim)
            stored = kind if value.dim() == 2 else "F32"
            yield quantize(value.contiguous().numpy(), GGMLQuantizationType[stored])


def _divisors(config: ModelConfig) -> Values:
    return frequency_divisors(config.rope, config.head_dim).numpy()
