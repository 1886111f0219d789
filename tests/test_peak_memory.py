"""The memory of a prefill: what is alive at once, counted tensor by tensor (attention's own scratch is not seen)."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkv import LLM, FastKV, FullKV
from fastkv.cache.policy import Policy

N_TOKENS = 1500
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE = 32, 4, 2, 8, 512


def rotary_tables(model: torch.nn.Module) -> list[Tensor]:
    """Tables that are the model's, and not in its parameters."""
    found = (getattr(each, "_table", None) for each in model.modules())
    return [tensor for table in found if table is not None for tensor in table]


class Alive(TorchDispatchMode):
    """Bytes of all tensors made inside, while something holds them or a view of them. `model` was there before."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        there = [*model.parameters(), *rotary_tables(model)]
        self.before = {tensor.untyped_storage()._cdata for tensor in there}
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.before:
            return
        if not self.holders[key]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.bytes -= size


def model_of(folder: Path, n_layers: int) -> LLM:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(folder, dtype="float32", device="cpu", load_format="dummy")


def peak(llm: LLM, policy: Policy) -> int:
    """Bytes alive at the worst moment of a prefill, the cache included, by a model that has just been loaded."""
    llm._model.reserve(N_TOKENS)  # the rotary table is the model's
    ids = torch.randint(64, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    with Alive(llm._model) as alive:
        llm.prefill(ids, policy, max_tokens=0)
    return alive.peak


def test_peak_memory_grows_with_depth_by_the_kept_entries_alone(tmp_path: Path) -> None:
    policy = FastKV(kv_retention=0.1, min_tokens=8)
    shallow, deep = (peak(model_of(tmp_path / str(n), n), policy) for n in (4, 12))
    kept = 8 * 160 * 2 * KV_HEADS * HEAD_DIM * 4  # 8 layers more, of 150 entries rounded up
    indices = 8 * 150 * KV_HEADS * 8 + 8 * N_TOKENS * 8  # which ones; and the positions that a layer saw
    assert deep - shallow <= kept + indices
    assert kept + indices < 0.15 * 8 * N_TOKENS * 2 * KV_HEADS * HEAD_DIM * 4 * 1.5  # nothing like 8 layers of all K/V
    full = peak(model_of(tmp_path / "12", 12), FullKV())
    assert full - deep > 0.8 * 12 * N_TOKENS * 2 * KV_HEADS * HEAD_DIM * 4


def test_the_widest_activation_is_a_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of a whole prompt are the largest tensors of a plain prefill."""
    llm = model_of(tmp_path / "model", 4)
    whole = peak(llm, FastKV(min_tokens=8))
    llm.free_buffers()
    monkeypatch.setattr("fastkv.engine.projection.CHUNK", 100)
    chunked = peak(llm, FastKV(min_tokens=8))
    assert whole - chunked > 0.9 * (N_TOKENS - 100) * 2 * WIDE * 4
    per_token = (HIDDEN + (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM) * 4  # hidden, q k v, attended
    scoring = HEADS * 8 * N_TOKENS * 4  # the attention of the observation window
    assert chunked < 1.4 * (N_TOKENS * per_token + 3 * scoring) + 100 * 4 * WIDE * 4
