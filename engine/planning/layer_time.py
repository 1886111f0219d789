"""What a layer of a decode step costs on this machine whatever is read: calls, and kernels too small to matter."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fastkv.cache.policies import FullKV
from fastkv.engine.llm import LLM

_FEW, _MORE = 2, 10  # layers of two networks, whose steps differ by nothing else
_STEPS = 40
# So small that reading it takes next to no time.
_SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}


def measure_layer(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of each layer: the difference of two networks' steps, over that of their layers. Takes a second or two.

    Steps are eager ones, as a CPU takes them.
    """
    few, more = (_step_of(n_layers, device, dtype) for n_layers in (_FEW, _MORE))
    return max(0.0, more - few) / (_MORE - _FEW)


def _step_of(n_layers: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the median step."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**_SHAPE, "num_hidden_layers": n_layers}))
        llm = LLM(folder, dtype=str(dtype).removeprefix("torch."), device=str(device), load_format="dummy")
    cache = llm.prefill([3] * 64, FullKV(), max_tokens=_STEPS).cache
    token, seconds = torch.tensor([3]), []
    for _ in range(_STEPS):
        started = time.perf_counter()
        llm.decode(cache, token)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
