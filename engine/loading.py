"""How much memory loading a model takes at its worst moment, worked out from its config before it begins.

The tokenizer is there first. Then one parameter after another is copied out of the mapped file (models/weights.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastkv.kernels.int8 import floats_at_a_time
from fastkv.kernels.limits import address_space_left
from fastkv.models.config import ModelConfig
from fastkv.models.weights import meta_model, model_bytes

# Bytes for each byte of tokenizer.json: what the tokenizers library takes while it reads one (measured by
# benchmarks/footprint.py: 11.6 and 10.9 for two real ones).
_TOKENIZER_TIMES = 11
# Bytes that libraries take when they are used for the first time, whatever the model is (measured there, too).
_LIBRARIES = 12 << 20
_UNMAPPED_AFTER = 2**24  # weights, after which the pages of the file are let go
_FLOAT = 4


def load_parts(
    config: ModelConfig, folder: Path | None, dtype: torch.dtype, weights: str | None, device: torch.device
) -> dict[str, int]:
    """Bytes that loading takes for good, by what they are for. folder: of the checkpoint; None: there is none.

    An embedding that stays the mapped file takes none. Under a limit on address space the mapped file counts, too.
    """
    parts = {"parameters": model_bytes(config, dtype, weights)}
    if device.type != "cpu" or folder is None:
        return parts
    if embedding_is_mapped(config, dtype):
        parts["parameters"] -= config.vocab_size * config.hidden_size * dtype.itemsize
    parts["the tokenizer"] = _TOKENIZER_TIMES * _size(folder / "tokenizer.json")
    if address_space_left() is not None:
        parts["the mapped file"] = sum(map(_size, folder.glob("*.safetensors")))
    return parts


def load_peak(config: ModelConfig, folder: Path, dtype: torch.dtype, weights: str | None, device: torch.device) -> int:
    """Resident bytes at the worst moment of loading on a CPU, with the pages of the file that are let go later."""
    parts = load_parts(config, folder, dtype, weights, device)
    stored = getattr(torch, config.dtype or "float32").itemsize
    model, skipped = meta_model(config), embedding_is_mapped(config, dtype)
    done = mapped = held = peak = 0
    for name, parameter in model.named_parameters():
        if skipped and name == "embed_tokens.weight":
            continue
        count = parameter.numel()
        int8 = weights is not None and parameter.dim() == 2
        mapped += count * stored
        held += count
        done += count * (1 if int8 else dtype.itemsize)
        # Made int8, some rows are there as floats: as they are, and divided by their scales.
        peak = max(peak, done + mapped + (2 * _FLOAT * min(count, floats_at_a_time()) if int8 else 0))
        if held > _UNMAPPED_AFTER:
            mapped = held = 0
    return min(peak + parts["the tokenizer"] + _LIBRARIES, sys.maxsize)


def embedding_is_mapped(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the embedding of a model on a CPU stays the mapped file."""
    return not config.tie_word_embeddings and config.dtype is not None and getattr(torch, config.dtype) == dtype


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
