"""Which tensors of a checkpoint, of which shapes, each parameter of a model is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkv.models.catalogue import family_of
from fastkv.models.config import ModelConfig
from fastkv.models.family import Family
from fastkv.models.linear import Stacked
from fastkv.models.llama import Llama

EMBEDDING = "embed_tokens"  # as modules of our own
HEAD = "lm_head"


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


def targets(model: Llama) -> list[Target]:
    """Every parameter with its checkpoint tensors, in the order of the layers. A tied head has none of its own."""
    return list(_targets(model.family, model))


def first_layer(config: ModelConfig) -> list[Source]:
    """The checkpoint tensors of layer 0, which alone is built for it, without memory.

    Raises RuntimeError for matrices of more values than torch can count.
    """
    family = family_of(config.architecture)
    with torch.device("meta"):
        layer = family.block(config, 0)
    return [source for target in _targets(family, layer, "layers.0.") for source in target.sources]


def table(config: ModelConfig, module: str) -> Source:
    """The checkpoint tensor of the embedding or of the head."""
    place = family_of(config.architecture).places(module)[0]
    return Source(f"{place}.weight", (config.vocab_size, config.hidden_size))


def _targets(family: Family, part: nn.Module, prefix: str = "") -> Iterator[Target]:
    """The parameters of a part of a model, whose names there begin with `prefix`."""
    for name, parameter in part.named_parameters():
        yield Target(prefix + name, _sources(family, part, name, parameter, prefix))


def _sources(family: Family, part: nn.Module, name: str, parameter: Tensor, prefix: str) -> tuple[Source, ...]:
    """Where the family says that a parameter is stored, in one tensor or in several that are stacked."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    places = family.places(prefix + module)
    if len(places) == 1:
        return (Source(f"{places[0]}.{kind}", tuple(parameter.shape)),)
    stacked = part.get_submodule(module)
    assert isinstance(stacked, Stacked), f"{name} is one matrix, but stored in {len(places)} places"
    pieces = zip(places, stacked.rows, strict=True)
    return tuple(Source(f"{place}.{kind}", (rows, *parameter.shape[1:])) for place, rows in pieces)
