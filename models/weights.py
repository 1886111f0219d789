"""safetensors -> model: built on the meta device, checked against the file headers, then filled one tensor at a time.

Parameters are copied out of the memory-mapped file, piece by piece: the model is never in memory twice. On a CPU they
lie in huge pages (kernels/memory.py), which are read faster than a mapped file. An embedding that is not the head, too,
is read a row at a time: it stays the mapped file where the dtype allows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkv.errors import FastKVError
from fastkv.kernels.int8 import quantise_
from fastkv.kernels.memory import HostMemory
from fastkv.models.checkpoint import Checkpoint
from fastkv.models.config import ModelConfig
from fastkv.models.linear import Linear
from fastkv.models.llama import Llama
from fastkv.models.sources import EMBEDDING, targets
from fastkv.models.stored import StoredNames
from fastkv.models.tying import settled_config

_EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
_HELD = 2**24  # weights that are read before the pages that they came from are let go

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
        return sum(_bytes_of(parameter.shape, dtype, _is_int8(model, name, weights)) for name, parameter in kept)
    except RuntimeError:  # a matrix of more values than torch can count
        return sys.maxsize


def _bytes_of(shape: Sequence[int], dtype: torch.dtype, int8: bool) -> int:
    """Of a parameter; of an int8 one with its scales."""
    return math.prod(shape) + 4 * shape[0] if int8 else math.prod(shape) * dtype.itemsize


def _is_int8(model: Llama, name: str, weights: str | None) -> bool:
    """Whether a parameter is kept as int8: the matrices of products, and the embedding where it is the head's, too."""
    module, _, kind = name.rpartition(".")
    if weights is None or kind != "weight":
        return False
    return isinstance(model.get_submodule(module), Linear) or (
        name == _EMBEDDING_WEIGHT and model.config.tie_word_embeddings
    )


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
    Raises FastKVError for missing, unexpected, misshapen or quantised tensors, and for broken files.
    """
    if not settled:
        config = settled_config(config, folder, dtype)
    model = meta_model(config)
    plan, memory = targets(model), HostMemory()
    with Checkpoint.open(folder) as checkpoint:
        names = StoredNames(checkpoint, config).of(source for target in plan for source in target.sources)
        total = model_bytes(config, dtype, weights)
        done = held = 0
        for target in plan:
            int8 = _is_int8(model, target.name, weights)
            pieces = (checkpoint.read(names[source.name]) for source in target.sources)
            if int8:
                _assign_int8(model, target.name, target.shape, pieces, memory, device)
            elif target.name == _EMBEDDING_WEIGHT and not config.tie_word_embeddings and device.type == "cpu":
                _assign(model, target.name, next(pieces).to(dtype))
            else:
                _assign(model, target.name, _stacked(pieces, target.rows, memory.empty(target.shape, dtype, device)))
            done += _bytes_of(target.shape, dtype, int8)
            held += math.prod(target.shape)
            if held > _HELD:
                checkpoint.unmap()
                held = 0
            if progress is not None:
                progress(done, total)
    return _ready(model, dtype, device)


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0, weights: str | None = None
) -> Llama:
    """A model of this architecture with random values, for measuring speed.

    Matrices are normal with deviation 1 / sqrt(columns), norms are 1, biases 0. The same seed gives the same values on
    the same kind of device. weights: as for `load_weights`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model, memory = meta_model(config), HostMemory()
    for name, parameter in list(model.named_parameters()):
        shape, int8 = tuple(parameter.shape), _is_int8(model, name, weights)
        value = torch.empty(shape, dtype=dtype, device=device) if int8 else memory.empty(shape, dtype, device)
        if value.dim() == 2:
            value.normal_(0, value.shape[1] ** -0.5, generator=generator)
        else:
            value.fill_(0 if name.endswith(".bias") else 1)
        if int8:
            _assign_int8(model, name, shape, [value], memory, device)
        else:
            _assign(model, name, value)
    return _ready(model, dtype, device)


def int8_bytes(config: ModelConfig) -> int:
    """Bytes that `in_int8` adds to a model of floats: the matrices, and their scales."""
    model = meta_model(config)
    kept = model.named_parameters()
    return sum(_bytes_of(each.shape, torch.float32, True) for name, each in kept if _is_int8(model, name, "int8"))


def in_int8(model: Llama) -> Llama:
    """The same network with matrices of 8-bit integers. It shares what is no matrix, and the rotation tables.

    A model whose weights are int8 already is given back itself.
    """
    if model.lm_head.scale is not None:
        return model
    other, memory = meta_model(model.config), HostMemory()
    for name, parameter in model.named_parameters():
        if _is_int8(other, name, "int8"):
            _assign_int8(other, name, tuple(parameter.shape), [parameter.detach()], memory, model.device)
        else:
            _assign(other, name, parameter)
    other.rotary = model.rotary
    return _ready(other, model.dtype, model.device)


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


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _stacked(pieces: Iterable[Tensor], rows: Sequence[int], value: Tensor) -> Tensor:
    """`value`, filled with the pieces, which have so many rows."""
    for part, piece in zip(value.split(list(rows)), pieces, strict=True):
        part.copy_(piece)
    return value


def _assign_int8(
    model: Llama, name: str, shape: tuple[int, ...], pieces: Iterable[Tensor], memory: HostMemory, device: torch.device
) -> None:
    """Let a weight be int8, quantised from the float pieces that it is stacked of."""
    values = memory.empty(shape, torch.int8, device)
    scale = memory.empty((shape[0],), torch.float32, device)  # not between the large tensors that come and go
    first = 0
    for piece in pieces:
        end = first + len(piece)
        quantise_(values[first:end], scale[first:end], piece)
        first = end
    _assign(model, name, values)
    model.get_submodule(name.rpartition(".")[0]).scale = scale
