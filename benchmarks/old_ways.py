"""What the engine did before, for as long as a measurement takes: the new way is measured beside the old one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

from fastkv.cache import scores
from fastkv.engine import attention, prefill
from fastkv.kernels import key_products
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama


@contextmanager
def all_tokens_attend() -> Iterator[None]:
    """Attention of all tokens at the TSP layer, of which those that are propagated are then taken."""
    with patch.object(prefill, "_propagated_only_pays", lambda *_: False):
        yield


@contextmanager
def no_padding() -> Iterator[None]:
    """cuDNN gets every prompt as long as it is."""
    with patch.object(attention, "_PADDED_BELOW", 0):
        yield


@contextmanager
def copied_keys() -> Iterator[None]:
    """Scores from a float32 copy of the keys."""
    with (
        patch.object(key_products, "has_float32_products", lambda *_: False),
        patch.object(scores, "has_float32_products", lambda *_: False),
    ):
        yield


def apart(model: Llama) -> None:
    """A compiled step takes the end of a layer and the beginning of the next as two regions, from now on."""

    def between(layer: int, hidden: Tensor, attended: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        model.blocks[layer].finish_(hidden, attended)
        return model.blocks[layer + 1].project(hidden, rope)

    model.between = between  # type: ignore[method-assign]
