"""Sessions as files: what Session.save writes, and what LLM.load_session takes of it.

The file is a safetensors file (engine/tensor_file.py) with these tensors, in this order; its header tells the rest.

layers.N.k, layers.N.v: the entries of a layer, [Hkv, n, D] in the plain layout, rows [R, D] where heads differ in
number. layers.N.positions: which positions a policy chose, in cache/positions_code.py; absent where none did. How many
entries each head has follows from these. ids: all token ids, in as few bytes each as the vocabulary takes. messages:
those of a chat, in JSON.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policy import Policy
from fastkv.cache.policy_data import policy_data, policy_of
from fastkv.cache.positions_code import as_bytes, decode, encode, from_bytes, width_of
from fastkv.cache.snapshot import Snapshot
from fastkv.engine.fingerprint import fingerprint
from fastkv.engine.tensor_file import BrokenFileError, TensorFile, write_tensors
from fastkv.engine.turn import Held
from fastkv.errors import FastKVError, brief
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama
from fastkv.storage import is_odd, replacing, unwritable

FORMAT = "fastkv-session"
VERSION = "1"  # of what stands in the file
WRITE, READ = "save_cache", "cache"  # the settings that name the file
LAYOUTS: dict[str, type[KVLayer]] = {each.__name__: each for each in (DenseLayer, PerHeadLayer, ModelWideLayer)}
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Saved:
    """What a file has of a session."""

    policy: Policy
    messages: Messages
    held: Held


def write_session(path: str | os.PathLike[str], model: Llama, saved: Saved) -> None:
    """See Session.save."""
    target = _path(path, WRITE)
    try:
        header, tensors = _header_of(model, saved), _tensors_of(model.config, saved)
    except FastKVError as error:
        raise FastKVError(f"{target}: the session cannot be saved: {error}", setting=WRITE) from None
    if is_odd(target):
        raise FastKVError(f"{target}: is there and no ordinary file; name another one", setting=WRITE)
    try:
        with replacing(target) as file:
            write_tensors(file, header, tensors)
    except OSError as error:
        raise unwritable(target, error, WRITE) from None


def read_session(path: str | os.PathLike[str], model: Llama) -> Saved:
    """See LLM.load_session."""
    source = _path(path, READ)
    if is_odd(source):
        raise FastKVError(f"{source}: cannot be read, for it is no ordinary file", setting=READ)
    try:
        file = TensorFile(source)
        _check_format(file.metadata)
        file.check()
        told = json.loads(file.metadata["session"])
        _check_model(told, model)
        policy, held = policy_of(told["policy"]), _held(file, told, model)
        policy.validate(model.config.n_layers, model.config.n_kv_heads)
        return Saved(policy, _messages(file), held)
    except OSError as error:
        raise FastKVError(f"{source}: cannot be read ({error.strerror})", setting=READ) from None
    except (BrokenFileError, FastKVError) as error:
        raise FastKVError(f"{source}: {error}", setting=READ) from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        # Of a file that is whole, and yet no session: somebody else wrote it.
        raise FastKVError(f"{source}: tells of a session that cannot be ({error})", setting=READ) from None


# --- writing ---


def _header_of(model: Llama, saved: Saved) -> dict[str, str]:
    version: str = importlib.import_module("fastkv").__version__  # not above: the package imports this module
    snapshot = saved.held.snapshot
    if snapshot is not None and snapshot.position != saved.held.fed:
        raise FastKVError(f"under policy {saved.policy.name} tokens stand at other positions, which files do not have")
    told = {
        "model": fingerprint(model),
        **_shape(model),
        "policy": policy_data(saved.policy),
        "layout": None if snapshot is None else _name_of(snapshot.layout),
        "position": 0 if snapshot is None else snapshot.position,
        "whole_from": 0 if snapshot is None else snapshot.whole_from,
        "fed": saved.held.fed,
    }
    return {"format": FORMAT, "version": VERSION, "fastkv": version, "session": json.dumps(told)}


def _name_of(layout: type[KVLayer]) -> str:
    if layout.kv_dtype is not None:
        raise FastKVError(f"its entries are {layout.kv_dtype}, which files do not have: leave kv_dtype out")
    if LAYOUTS.get(layout.__name__) is not layout:
        raise FastKVError(f"its entries are in the layout {layout.__name__}, which files do not have")
    return layout.__name__


def _shape(model: Llama) -> dict[str, Any]:
    """What entries fit this model."""
    config = model.config
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": "int8" if model.lm_head.scale is not None else None,
        "layers": config.n_layers,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
    }


def _tensors_of(config: ModelConfig, saved: Saved) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    snapshot = saved.held.snapshot
    if snapshot is not None:
        for layer, state in enumerate(snapshot.layers):
            tensors |= {f"layers.{layer}.k": state["k"], f"layers.{layer}.v": state["v"]}
        for layer, chosen in enumerate(snapshot.chosen):
            if chosen is not None:
                tensors[f"layers.{layer}.positions"] = encode(chosen[0])
    ids = torch.tensor(saved.held.ids, dtype=torch.int64)
    tensors["ids"] = as_bytes(ids, width_of(config.vocab_size))
    if not _are_messages(saved.messages):
        raise FastKVError("its messages must be dicts of texts")
    tensors["messages"] = torch.frombuffer(bytearray(json.dumps(saved.messages).encode()), dtype=torch.uint8)
    return tensors


# --- reading ---


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise BrokenFileError("is no session file; Session.save writes one")
    version = metadata.get("version")
    if version != VERSION:
        wrote = brief(metadata.get("fastkv"))
        raise BrokenFileError(
            f"is a session file of version {brief(version)}, and this fastkv reads version {VERSION!r}: load it with "
            f"the one that wrote it, {wrote}, or save the session anew"
        )


def _check_model(told: Mapping[str, Any], model: Llama) -> None:
    """BrokenFileError unless the session is of this model, loaded in the same way."""
    for name, own in _shape(model).items():
        if told[name] == own:
            continue
        if name == "dtype":
            raise BrokenFileError(
                f"was saved in {brief(told[name])}, and this model computes in {own}: load it with that --dtype"
            )
        if name == "weights":
            ways = {None: "without int8 weights", "int8": "with int8 weights"}
            way = "leave --weights out" if told[name] is None else "load the model with --weights int8"
            raise BrokenFileError(f"was saved {ways[told[name]]}, and this model was loaded {ways[own]}: {way}")
        raise BrokenFileError(
            f"is of another model: that one has {told['layers']} layers of {told['kv_heads']} KV heads with "
            f"{told['head_dim']} values, this one {model.config.n_layers} of {model.config.n_kv_heads} with "
            f"{model.config.head_dim}"
        )
    own = fingerprint(model)
    if told["model"] != own:
        raise BrokenFileError(
            f"is of another model: the fingerprint of its weights is {brief(told['model'])}, that of this model is "
            f"{own}; load the model that the session was saved with"
        )


def _held(file: TensorFile, told: Mapping[str, Any], model: Llama) -> Held:
    config = model.config
    ids = from_bytes(file.tensor("ids", torch.uint8, 1), width_of(config.vocab_size))
    if len(ids) > config.context_length:
        raise BrokenFileError(f"has {len(ids)} tokens, and the model's context is {config.context_length}")
    if len(ids) and int(ids.max()) >= config.vocab_size:
        raise BrokenFileError(f"has token id {int(ids.max())}, and the vocabulary {config.vocab_size}")
    position, whole_from, fed = (told[name] for name in ("position", "whole_from", "fed"))
    if not all(type(each) is int for each in (position, whole_from, fed)):
        raise BrokenFileError("has a position that is no whole number")
    if not 0 <= whole_from <= position == fed <= len(ids):
        raise BrokenFileError(
            f"has the positions {whole_from}, {position} and {fed} in a sequence of {len(ids)} tokens"
        )
    names = {"ids", "messages"}
    if told["layout"] is None:
        snapshot = None
        if len(ids):
            raise BrokenFileError("has tokens, but no entries")
    else:
        layout = LAYOUTS[told["layout"]]
        shape = EntryShape(config.n_kv_heads, config.head_dim, model.dtype)
        layers = [
            _layer(file, f"layers.{layer}.", layout, shape, whole_from, position) for layer in range(config.n_layers)
        ]
        snapshot = _snapshot(layout, shape, layers, position, whole_from)
        names |= {f"layers.{i}.{kind}" for i in range(config.n_layers) for kind in ("k", "v", "positions")}
    if file.names - names:
        raise BrokenFileError(f"has a tensor {min(file.names - names)}, which no session has")
    return Held(tuple(ids.tolist()), fed, snapshot)


@dataclass(frozen=True)
class _Layer:
    state: dict[str, Tensor]
    chosen: Tensor | None
    counts: list[int]  # of each head


def _layer(
    file: TensorFile, prefix: str, layout: type[KVLayer], shape: EntryShape, whole_from: int, position: int
) -> _Layer:
    """One layer, all that it says of itself checked."""
    k, v = (file.tensor(prefix + name, shape.dtype, 2 if layout.per_head else 3) for name in ("k", "v"))
    n_rows = k.shape[:-1].numel()
    if k.shape != v.shape or k.shape[-1] != shape.head_dim or not (layout.per_head or len(k) == shape.n_kv_heads):
        raise BrokenFileError(f"has entries of the shapes {list(k.shape)} and {list(v.shape)} at {prefix}k and v")
    if prefix + "positions" in file:
        data = file.tensor(prefix + "positions", torch.uint8, 1)
        chosen = decode(data, shape.n_kv_heads, whole_from, n_rows)
        counts = chosen.ge(0).sum(dim=1) + position - whole_from
    elif whole_from:
        raise BrokenFileError(f"has no {prefix}positions")
    else:
        chosen, counts = None, torch.full((shape.n_kv_heads,), position)
    even = layout.per_head or counts.eq(k.shape[1]).all()
    if int(counts.sum()) != n_rows or not even:
        raise BrokenFileError(f"has {n_rows} entries at {prefix}k, and {int(counts.sum())} positions")
    state = {"k": k, "v": v, "counts": counts} if layout.per_head else {"k": k, "v": v}
    return _Layer(state, None if chosen is None else chosen.unsqueeze(0), counts.tolist())


def _snapshot(
    layout: type[KVLayer], shape: EntryShape, layers: list[_Layer], position: int, whole_from: int
) -> Snapshot:
    return Snapshot(
        layout,
        shape,
        tuple(layer.state for layer in layers),
        tuple(layer.chosen for layer in layers),
        tuple(max(layer.counts) for layer in layers),
        tuple(sum(layer.counts) for layer in layers),
        position,
        whole_from,
    )


def _messages(file: TensorFile) -> Messages:
    found = json.loads(file.tensor("messages", torch.uint8, 1).numpy().tobytes())
    if not _are_messages(found):
        raise BrokenFileError("has messages that are none")
    messages: Messages = found
    return messages


def _are_messages(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(each, dict) and all(isinstance(text, str) for pair in each.items() for text in pair)
        for each in found
    )


def _path(path: Any, setting: str) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise FastKVError(f"a session's file must be named by a path, not {brief(path)}", setting=setting)
    return Path(path)
