"""What the engine did before, for as long as a measurement takes: the new way is measured beside the old one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from fastkv.cache import products, scores
from fastkv.engine import attention, prefill


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
        patch.object(products, "has_float32_products", lambda *_: False),
        patch.object(scores, "has_float32_products", lambda *_: False),
    ):
        yield
