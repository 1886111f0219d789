"""Small valid model folders, as the bytes of their files: what the hostile ones are made from."""

from __future__ import annotations

import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from safetensors.torch import save
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from fastkv import LLM
from fastkv.models.weights import checkpoint_tensors

Files = dict[str, bytes]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BOS, EOS = 0, 1
VOCABULARY, CONTEXT = 340, 128
CORPUS = ["hello world and hello again", "the quick brown fox jumps over the lazy dog", "two  spaces\n\nand lines"] * 20
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 16},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "Qwen3ForCausalLM": {"head_dim": 8},
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0},
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Kinds of folders: which tokenizer, and whether the weights are in shards.
KINDS = ("json", "pieces", "shards")


def sizes(family: str) -> dict[str, Any]:
    """A config.json that says everything: two layers, four query heads, two KV heads."""
    return {
        "architectures": [family],
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **FAMILIES[family],
    }


@cache
def base_folder(family: str, kind: str) -> Files:
    """The files of a model of this family. kind: of KINDS."""
    config = sizes(family)
    files = {"config.json": as_json(config), "generation_config.json": as_json({"eos_token_id": [EOS]})}
    files |= _weights(config, shards=kind == "shards")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "pieces":
        special["chat_template"] = TEMPLATE
        added = {"content": "<tool>", "special": True}
        files["tokenizer.model"] = pieces()
        files["tokenizer_config.json"] = as_json({**special, "added_tokens_decoder": {"330": added}})
        files["added_tokens.json"] = as_json({"<extra>": 331})
    else:
        files["tokenizer.json"] = byte_level().to_str().encode()
        files["tokenizer_config.json"] = as_json(special)
        files["special_tokens_map.json"] = as_json(special)
        files["chat_template.jinja"] = TEMPLATE.encode()
    return files


def as_json(values: Any) -> bytes:
    return json.dumps(values).encode()


def write(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _weights(config: dict[str, Any], shards: bool) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        write({"config.json": as_json(config)}, Path(folder))
        tensors = checkpoint_tensors(LLM(folder, device="cpu", load_format="dummy").model)
    if not shards:
        return {WEIGHTS: save(tensors)}
    homes = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    files = {
        shard: save({name: tensor for name, tensor in tensors.items() if homes[name] == shard})
        for shard in sorted(set(homes.values()))
    }
    return {**files, INDEX: as_json({"metadata": {"total_size": 1}, "weight_map": homes})}


@cache
def byte_level() -> LibraryTokenizer:
    """A byte-level BPE, as of Llama 3 and Qwen, with an added token that is not special."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<tool>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<added>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@cache
def pieces() -> bytes:
    """A tokenizer.model, as of Llama 2, whose ids 0, 1 and 2 are <unk>, <s> and </s>."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()
