"""safetensors -> model: built on the meta device, checked against the file headers, then filled one tensor at a time.

Parameters are copied out of the memory-mapped file, piece by piece: the model is never in memory twice. On a CPU they
lie in huge pages (kernels/memory.py), which are read faster than a mapped file. An embedding that is not the head, too,
is read a row at a time: it stays the mapped file where the dtype allows.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkv.errors import FastKVError
from fastkv.kernels.int8 import quantise_
from fastkv.kernels.memory import HostMemory
from fastkv.models.checkpoint import Checkpoint
from fastkv.models.config import ModelConfig
from fastkv.models.linear import Linear, Stacked
from fastkv.models.llama import Llama

# Checkpoints may carry these beyond what the model needs: a table that is computed, and a head that is the embedding.
_ROTARY_TABLE = re.compile(r"rotary_emb\.inv_freq$")
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
_HELD = 2**24  # weights that are read before the pages that they came from are let go

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """One parameter of the model, and the checkpoint tensors that it consists of, stacked by rows."""

    name: str
    sources: tuple[Source, ...]

    @property
    def rows(self) -> list[int]:
        """Of each of the tensors."""
        return [source.shape[0] for source in self.sources]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return (sum(self.rows), *self.sources[0].shape[1:])


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
    return isinstance(model.get_submodule(module), Linear) or (name == _EMBEDDING and model.config.tie_word_embeddings)


def targets(model: Llama) -> list[Target]:
    """Every parameter with its checkpoint tensors, in the order of the layers. A tied head has none of its own."""
    return [Target(name, _sources(model, name, parameter)) for name, parameter in model.named_parameters()]


def load_weights(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    weights: str | None = None,
) -> Llama:
    """A model filled from the safetensors files of `folder`, in `dtype` on `device`, without gradients.

    weights: "int8" for matrices of 8-bit integers, made of each tensor as it is read (None: all in `dtype`).
    Raises FastKVError for missing, unexpected, misshapen or quantised tensors, and for broken files.
    """
    model = meta_model(config)
    plan, memory = targets(model), HostMemory()
    with Checkpoint.open(folder) as checkpoint:
        _check(checkpoint, plan, config)
        total = model_bytes(config, dtype, weights)
        done = held = 0
        for target in plan:
            int8 = _is_int8(model, target.name, weights)
            pieces = (checkpoint.read(source.name) for source in target.sources)
            if int8:
                _assign_int8(model, target.name, target.shape, pieces, memory, device)
            elif target.name == _EMBEDDING and not config.tie_word_embeddings and device.type == "cpu":
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


def _sources(model: Llama, name: str, parameter: Tensor) -> tuple[Source, ...]:
    """Where the family says that a parameter is stored, in one tensor or in several that are stacked."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    places = model.family.places(module)
    if len(places) == 1:
        return (Source(f"{places[0]}.{kind}", tuple(parameter.shape)),)
    stacked = model.get_submodule(module)
    assert isinstance(stacked, Stacked), f"{name} is one matrix, but stored in {len(places)} places"
    pieces = zip(places, stacked.rows, strict=True)
    return tuple(Source(f"{place}.{kind}", (rows, *parameter.shape[1:])) for place, rows in pieces)


def _check(checkpoint: Checkpoint, plan: list[Target], config: ModelConfig) -> None:
    wanted = {source.name: source.shape for target in plan for source in target.sources}
    stored = set(checkpoint.names)
    if missing := [name for name in wanted if name not in stored]:
        raise FastKVError(f"{checkpoint.path}: missing {_some(missing)}; is the download complete?")
    allowed = {_HEAD} if config.tie_word_embeddings else set()
    extra = [n for n in sorted(stored) if n not in wanted and n not in allowed and not _ROTARY_TABLE.search(n)]
    if extra:
        raise FastKVError(
            f"{checkpoint.path}: unexpected {_some(extra)}; the weights do not belong to this config.json"
        )
    for name, shape in wanted.items():
        checkpoint.check(name, shape)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"


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
    scale = torch.empty(shape[0], dtype=torch.float32, device=device)
    first = 0
    for piece in pieces:
        end = first + len(piece)
        quantise_(values[first:end], scale[first:end], piece)
        first = end
    _assign(model, name, values)
    model.get_submodule(name.rpartition(".")[0]).scale = scale
