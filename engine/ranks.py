"""What one of several ranks holds of a model: of heads, MLP columns and rows of the vocabulary (tensor parallel)."""

from __future__ import annotations

from dataclasses import replace

from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig


def rank_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The network of one rank of `ranks`, with its heads and MLP columns, and logits over the whole vocabulary.

    Raises FastKVError where KV heads or columns cannot be split so.
    """
    _check(config, ranks)
    return replace(
        config,
        n_heads=config.n_heads // ranks,
        n_kv_heads=config.n_kv_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )


def stored_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The same with the rows of embedding and head that a rank holds at the most: a network of as many parameters."""
    return replace(rank_config(config, ranks), vocab_size=-(-config.vocab_size // ranks))


def possible_ranks(config: ModelConfig) -> list[int]:
    """The numbers of ranks that a model can be split over."""
    counts = range(1, config.n_kv_heads + 1)
    return [n for n in counts if config.n_kv_heads % n == 0 and config.intermediate_size % n == 0]


def _check(config: ModelConfig, ranks: int) -> None:
    for count, what in ((config.n_kv_heads, "KV heads"), (config.intermediate_size, "columns of the MLP")):
        if count % ranks:
            known = ", ".join(map(str, possible_ranks(config)))
            raise FastKVError(
                f"the model's {count:,} {what} cannot be split over {ranks} GPUs alike; it takes one of {known}",
                setting="gpus",
            )
