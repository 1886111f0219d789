"""safetensors -> model: built on the meta device, checked against the file headers, then filled one tensor at a time.

Parameters are copied out of the memory-mapped file, piece by piece: the model is never in memory twice. On a CPU they
lie in huge pages (kernels/memory.py), which are read faster than a mapped file. An embedding that is not the head, too,
is read a row at a time: it stays the mapped file where the dtype allows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkv.errors import FastKVError
from fastkv.kernels import int4, int8
from fastkv.kernels.memory import HostMemory
from fastkv.models.checkpoint import Checkpoint
from fastkv.models.config import ModelConfig
from fastkv.models.layers import Embedding
from fastkv.models.linear import Linear
from fastkv.models.llama import Llama
from fastkv.models.network_config import Part
from fastkv.models.sources import EMBEDDING, Source, Target, targets
from fastkv.models.split import cut, whole_of
from fastkv.models.stored import StoredNames
from fastkv.models.tying import settled_config

_EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
_HELD = 2**24  # weights that are read before the pages that they came from are let go

_KINDS = {"int8": int8, "int4": int4}  # of integers that a matrix may be kept in

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def meta_model(config: ModelConfig) -> Llama:
    """The network whose parameters have no memory yet."""
    with torch.device("meta"):
        return Llama(config)


def model_bytes(config: ModelConfig, dtype: torch.dtype, weights: str | None = None) -> int:
    """Bytes that the parameters take in `dtype`, the matrices in what `weights` says (None: in `dtype`, too)."""
    try:
        model = meta_model(config)
        kept = model.named_parameters()
        return sum(_bytes_of(parameter.shape, dtype, _kind(model, name, weights)) for name, parameter in kept)
    except RuntimeError:  # a matrix of more values than torch can count
        return sys.maxsize


def _bytes_of(shape: Sequence[int], dtype: torch.dtype, kind: str | None) -> int:
    """Of a parameter; of integers with their scales."""
    tensors = [(shape, dtype)] if kind is None else _KINDS[kind].shapes(*shape)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)


def _kind(model: Llama, name: str, weights: str | None) -> str | None:
    """What a parameter is kept in, where it is integers: the matrices of products, and the embedding that is the head.

    Under int4 the head is int8. By hand, over 400 tokens of a SmolLM2-135M whose layers have 16 levels as they come:
    the most probable token stayed for 97 % of them, and for 86 % with a head of 4 bits.
    """
    if weights is None or not name.endswith(".weight"):
        return None
    owner, tied = _owner(model, name), model.config.tie_word_embeddings
    if owner is model.lm_head or (owner is model.embed_tokens and tied):
        return "int8"
    return weights if isinstance(owner, Linear) else None


def load_weights(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    weights: str | None = None,
    settled: bool = False,
) -> Llama:
    """A model filled from the safetensors files of `folder`, in `dtype` on `device`, without gradients.

    weights: "int8" for matrices of 8-bit integers, made of each tensor as it is read (None: all in `dtype`). settled:
    `config` is what `settled_config` gave; else that is done first, and the model's own config tells what came of it.
    Of a part (models/split.py) only that part of each tensor is read.
    Raises FastKVError for missing, unexpected, misshapen or quantised tensors, and for broken files.
    """
    if not settled:
        config = settled_config(config, folder, dtype)
    model = meta_model(config)
    plan, memory = targets(model), HostMemory()
    stored = plan if config.part is None else targets(meta_model(whole_of(config)))
    with Checkpoint.open(folder) as checkpoint:
        names = StoredNames(checkpoint, config).of(source for target in stored for source in target.sources)
        total = model_bytes(config, dtype, weights)
        done = held = 0
        for target in plan:
            kind = _kind(model, target.name, weights)
            pieces = (_read(checkpoint, names, source, config) for source in target.sources)
            if kind is not None:
                _assign_integers(model, target.name, kind, target.shape, pieces, memory, device)
            elif target.name == _EMBEDDING_WEIGHT and not config.tie_word_embeddings and device.type == "cpu":
                _assign(model, target.name, next(pieces).to(dtype))
            else:
                _assign(model, target.name, _stacked(pieces, target.rows, memory.empty(target.shape, dtype, device)))
            done += _bytes_of(target.shape, dtype, kind)
            held += math.prod(target.shape)
            if held > _HELD:
                checkpoint.unmap()
                held = 0
            if progress is not None:
                progress(done, total)
    return _ready(model, dtype, device)


def _read(checkpoint: Checkpoint, names: Mapping[str, str], source: Source, config: ModelConfig) -> Tensor:
    """A tensor of a checkpoint, or the part of it that is this model's."""
    tensor = checkpoint.read(names[source.name])
    return tensor if config.part is None else cut(tensor, source.shape, config.part)


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0, weights: str | None = None
) -> Llama:
    """A model of this architecture with random values, for measuring speed.

    Matrices are normal with deviation 1 / sqrt(columns), norms are 1, biases 0. The same seed gives the same values on
    the same kind of device. weights: as for `load_weights`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model, memory = meta_model(config), HostMemory()
    whole = model if config.part is None else meta_model(whole_of(config))
    for target, drawn in zip(targets(model), targets(whole), strict=True):
        name, kind = target.name, _kind(model, target.name, weights)
        is_taken, shape = kind is None and config.part is None, drawn.shape  # of a part the whole is drawn, and let go
        value = memory.empty(shape, dtype, device) if is_taken else torch.empty(shape, dtype=dtype, device=device)
        if value.dim() == 2:
            value.normal_(0, value.shape[1] ** -0.5, generator=generator)
        else:
            value.fill_(0 if name.endswith(".bias") else 1)
        pieces = [value] if config.part is None else _cuts(value, drawn, target, config.part)
        if kind:
            _assign_integers(model, name, kind, target.shape, pieces, memory, device)
        elif is_taken:
            _assign(model, name, value)
        else:
            _assign(model, name, _stacked(pieces, target.rows, memory.empty(target.shape, dtype, device)))
    return _ready(model, dtype, device)


def _cuts(value: Tensor, whole: Target, target: Target, part: Part) -> list[Tensor]:
    """Of a whole parameter the parts of the tensors that it is stacked of."""
    pieces = zip(value.split(whole.rows), target.sources, strict=True)
    return [cut(piece, source.shape, part) for piece, source in pieces]


def copy_bytes(config: ModelConfig, kind: str, weights: str | None = None) -> int:
    """Bytes that `in_integers` adds to a model that was loaded with `weights`: the matrices, and their scales.

    Raises FastKVError for a matrix that int4 cannot hold: of rows that are no whole number of groups.
    """
    model = meta_model(config)
    added = 0
    for name, parameter in model.named_parameters():
        made = _kind(model, name, kind)
        if made == "int4" and parameter.shape[1] % int4.GROUP:
            raise FastKVError(
                f"int4 has groups of {int4.GROUP} weights, and the model has rows of {parameter.shape[1]}: take int8",
                setting="draft_weights",
            )
        if made not in (None, _kind(model, name, weights)):
            added += _bytes_of(parameter.shape, torch.float32, made)
    return added


def in_integers(model: Llama, kind: str) -> Llama:
    """The same network with matrices of integers, kind: "int8" | "int4" (of an int4 one the head is int8).

    It shares what is no matrix, what is integers of that kind already, and the rotation tables. A model of which that
    is all is given back itself.
    """
    other, memory = meta_model(model.config), HostMemory()
    shares_all = True
    for name, parameter in model.named_parameters():
        made, (owner, copy) = _kind(other, name, kind), (_owner(each, name) for each in (model, other))
        if made is None:
            _assign(other, name, parameter)
        elif made == "int8" and owner.scale is not None:
            _assign(other, name, parameter)
            copy.scale = owner.scale
        else:
            shape, pieces = tuple(parameter.shape), _as_floats(parameter.detach(), owner.scale)
            _assign_integers(other, name, made, shape, pieces, memory, model.device)
            shares_all = False
    other.rotary = model.rotary
    return model if shares_all else _ready(other, model.dtype, model.device)


def bytes_apart(copy: Llama, model: Llama) -> int:
    """Bytes of the parameters and scales of a copy that the model itself does not hold."""
    own, others = _held(copy), _held(model)
    return sum(tensor.nbytes for address, tensor in own.items() if address not in others)


def _held(model: Llama) -> dict[int, Tensor]:
    """Parameters and scales, by their addresses."""
    owners = (each for each in model.modules() if isinstance(each, (Linear, Embedding)))
    scales = (each.scale for each in owners if each.scale is not None)
    return {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *scales)}


def checkpoint_tensors(model: Llama) -> dict[str, Tensor]:
    """The parameters under their checkpoint names, fused ones taken apart: what a safetensors file should hold.

    Raises FastKVError for int8 weights, of which the floats are gone.
    """
    if any(isinstance(each, Linear) and each.scale is not None for each in model.modules()):
        raise FastKVError("int8 weights cannot be written to a checkpoint: load the model without them")
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for target in targets(model):
        pieces = parameters[target.name].detach().split([source.shape[0] for source in target.sources])
        tensors.update({source.name: piece.contiguous() for source, piece in zip(target.sources, pieces, strict=True)})
    return tensors


def _ready(model: Llama, dtype: torch.dtype, device: torch.device) -> Llama:
    model.tie()
    model.computes_in(dtype)
    model.rotary.to(device)
    return model.eval()


def _owner(model: nn.Module, name: str) -> Any:
    """The module that has a parameter."""
    return model.get_submodule(name.rpartition(".")[0])


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    setattr(_owner(model, name), name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))


def _stacked(pieces: Iterable[Tensor], rows: Sequence[int], value: Tensor) -> Tensor:
    """`value`, filled with the pieces, which have so many rows."""
    for part, piece in zip(value.split(list(rows)), pieces, strict=True):
        part.copy_(piece)
    return value


def _as_floats(values: Tensor, scale: Tensor | None) -> Iterable[Tensor]:
    """A matrix of floats or int8 as pieces of floats, of which few are made at a time."""
    if scale is None:
        return [values]
    rows = max(1, int8.floats_at_a_time() // values.shape[1])
    pieces = zip(values.split(rows), scale.split(rows), strict=True)
    return (int8.dequantised(*piece, torch.float32) for piece in pieces)


def _assign_integers(
    model: Llama,
    name: str,
    kind: str,
    shape: tuple[int, ...],
    pieces: Iterable[Tensor],
    memory: HostMemory,
    device: torch.device,
) -> None:
    """Let a weight be integers, quantised from the float pieces that it is stacked of."""
    # The scales, too: not between the large tensors that come and go.
    values, scale = (memory.empty(size, dtype, device) for size, dtype in _KINDS[kind].shapes(*shape))
    first = 0
    for piece in pieces:
        end = first + len(piece)
        _KINDS[kind].quantise_(values[first:end], scale[first:end], piece)
        first = end
    _assign(model, name, values)
    _owner(model, name).scale = scale
