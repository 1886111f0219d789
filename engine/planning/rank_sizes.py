"""What one of several ranks holds of a model: of heads, MLP columns and rows of the vocabulary (tensor parallel)."""

from __future__ import annotations

from dataclasses import replace

from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.split import part_of


def rank_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The network of one rank of `ranks`, with its heads and MLP columns, and logits over the whole vocabulary.

    Raises FastKVError where KV heads or columns cannot be split so.
    """
    if ranks == 1:
        return config
    try:
        return part_of(config, 0, ranks)  # the first one holds no less than the others
    except FastKVError as error:
        raise FastKVError(str(error), setting="gpus") from None


def stored_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The same as a model of its own, with the rows of embedding and head that it holds: as many parameters."""
    rank = rank_config(config, ranks)
    return replace(rank, vocab_size=rank.table_rows, part=None)
