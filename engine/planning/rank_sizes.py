"""What one of several ranks holds of a model: of heads, MLP columns and rows of the vocabulary (tensor parallel)."""

from __future__ import annotations

from dataclasses import replace

from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.split import part_of, possible_counts


def rank_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The network of one rank of `ranks`, with its heads and MLP columns, and logits over the whole vocabulary.

    Raises FastKVError where KV heads or columns cannot be split so.
    """
    _check(config, ranks)
    return config if ranks == 1 else part_of(config, 0, ranks)  # the first one holds no less than the others


def stored_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The same as a model of its own, with the rows of embedding and head that it holds: as many parameters."""
    rank = rank_config(config, ranks)
    return replace(rank, vocab_size=rank.table_rows, part=None)


def _check(config: ModelConfig, ranks: int) -> None:
    for count, what in ((config.n_kv_heads, "KV heads"), (config.intermediate_size, "columns of the MLP")):
        if count % ranks:
            known = ", ".join(map(str, possible_counts(config)))
            raise FastKVError(
                f"the model's {count:,} {what} cannot be split over {ranks} GPUs alike; it takes one of {known}",
                setting="gpus",
            )
