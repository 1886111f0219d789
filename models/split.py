"""Which part of a model each rank has, after Megatron-LM (arXiv 1909.08053).

Query and KV heads and the columns of the MLP are shared out, and with them the rows of the matrices that make them and
the columns of those that read them (`Summed`). Embedding and head have a part of the vocabulary. What is left (norms
over the hidden size, biases of sums) every rank has whole. So a rank's parameters have the shapes that its config asks
for, and where they differ from the whole model's is where a checkpoint's tensors are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fastkv.errors import FastKVError
from fastkv.kernels.ranks import Across, Ranks
from fastkv.models.config import ModelConfig
from fastkv.models.linear import Stacked
from fastkv.models.llama import Llama
from fastkv.models.network_config import NetworkConfig, Part

Config = TypeVar("Config", bound=NetworkConfig)


def part_of(config: Config, rank: int, count: int) -> Config:
    """The config of one of `count` ranks' parts of a model.

    Raises FastKVError for heads or MLP columns that cannot be shared out equally, and for too few tokens.
    """
    for size, what in (
        (config.n_kv_heads, "KV heads (num_key_value_heads)"),
        (config.n_heads, "query heads (num_attention_heads)"),
        (config.intermediate_size, "MLP columns (intermediate_size)"),
    ):
        if size % count:
            raise FastKVError(
                f"{count} ranks cannot share {size} {what} equally; take {_counts(config)}", setting="tensor_parallel"
            )
    part = Part(rank, count, config)
    if part.range(config.vocab_size)[0] >= config.vocab_size:
        raise FastKVError(f"{count} ranks are too many for {config.vocab_size} tokens", setting="tensor_parallel")
    return replace(
        config,
        n_heads=config.n_heads // count,
        n_kv_heads=config.n_kv_heads // count,
        intermediate_size=config.intermediate_size // count,
        part=part,
    )


def possible_counts(config: NetworkConfig) -> list[int]:
    """How many ranks can share a model, 1 among them."""
    sizes = (config.n_kv_heads, config.n_heads, config.intermediate_size)
    return [n for n in range(1, config.n_kv_heads + 1) if not any(size % n for size in sizes)]


def _counts(config: NetworkConfig) -> str:
    """How many ranks can share a model, in words."""
    counts = [str(n) for n in possible_counts(config) if n > 1]
    if not counts:
        return "one process"
    return counts[0] if len(counts) == 1 else f"{', '.join(counts[:-1])} or {counts[-1]}"


def cut(tensor: Tensor, shape: Sequence[int], part: Part) -> Tensor:
    """A rank's part of a checkpoint's tensor, a view of this shape: some of its rows or columns, where that differs."""
    for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if size != wanted:
            first, end = part.range(size)
            tensor = tensor.narrow(dim, first, end - first)
    return tensor


def join(model: Llama, ranks: Ranks) -> None:
    """Let the parts of a model meet the others. Raises FastKVError for a network that holds what cannot be cut."""
    part = model.config.part
    assert part is not None, "the model is a part"
    _check_cuts(model)
    model.embed_tokens.first = part.range(model.config.vocab_size)[0]
    for module in model.modules():
        if isinstance(module, Across):
            module.ranks = ranks


def _check_cuts(model: Llama) -> None:
    """What is cut gives a part of something, so its owner must be one that joins the parts, or a matrix cut by rows."""
    with torch.device("meta"):
        whole = Llama(whole_of(model.config))
    for (name, mine), full in zip(model.named_parameters(), whole.parameters(), strict=True):
        if mine.shape == full.shape or mine is model.lm_head.weight:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        by_rows = isinstance(owner, Stacked) and mine.shape[1:] == full.shape[1:]
        if not (by_rows or isinstance(owner, Across)):
            raise FastKVError(
                f"{model.config.architecture}: {name} cannot be shared out over ranks: leave tensor_parallel out",
                setting="tensor_parallel",
            )


def whole_of(config: ModelConfig) -> ModelConfig:
    """The config of the model that `config` may be a part of."""
    whole = config if config.part is None else config.part.whole
    assert isinstance(whole, ModelConfig)
    return whole
