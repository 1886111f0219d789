"""Whether the head is the embedding: as config.json says, unless the checkpoint holds two that differ."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from fastkv.models.checkpoint import Checkpoint
from fastkv.models.config import ModelConfig
from fastkv.models.sources import EMBEDDING, HEAD, table
from fastkv.models.stored import StoredNames, check_sizes

_AT_A_TIME = 2**22  # values of each that are compared
_PARTS = 4  # that are compared before the pages that they came from are let go

_log = logging.getLogger(__name__)


def settled_config(config: ModelConfig, folder: Path, dtype: torch.dtype) -> ModelConfig:
    """`config` as the weights in `folder` are, to be loaded in `dtype`: untied where the stored head is another matrix.

    That is said in a warning. Raises FastKVError where config.json and the header of the files do not belong together,
    before anything is built.
    """
    with Checkpoint.open(folder) as checkpoint:
        check_sizes(checkpoint, config)
        names = StoredNames(checkpoint, config)
        embedding, head = (names.own(table(config, module).name) for module in (EMBEDDING, HEAD))
        if not config.tie_word_embeddings or embedding is None or head is None:
            return config
        if _equal(checkpoint, embedding, head, dtype):
            return config
        _log.warning(
            "%s: config.json says tie_word_embeddings true, but %s and %s differ: each is used as it is stored (set "
            "tie_word_embeddings to false to say so)",
            checkpoint.path,
            head,
            embedding,
        )
    return replace(config, tie_word_embeddings=False)


def _equal(checkpoint: Checkpoint, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two matrices of the same shape are the same in `dtype`. Reads some rows of both at a time."""
    n_rows, n_columns = checkpoint.shape_of(one)
    rows = max(1, _AT_A_TIME // n_columns)
    for number, first in enumerate(range(0, n_rows, rows), 1):
        part, its_twin = (checkpoint.read(name)[first : first + rows].to(dtype) for name in (one, other))
        if not torch.equal(part, its_twin):
            return False
        if number % _PARTS == 0:
            checkpoint.unmap()
    return True
