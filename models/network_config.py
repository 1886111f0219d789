"""What a network is built from: sizes, biases, rotary embedding, sliding windows. Knows no file and no family."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastkv.models.rope_config import RopeConfig


@dataclass(frozen=True)
class Part:
    """Which part of a model a rank has: one of `count`, the `rank`-th from 0. whole: the config of the model itself."""

    rank: int
    count: int
    whole: NetworkConfig

    def range(self, size: int) -> tuple[int, int]:
        """(first, end) of this rank's part of `size` rows or columns: as many as another's, the last ones fewer."""
        each = -(-size // self.count)
        return min(size, self.rank * each), min(size, (self.rank + 1) * each)


@dataclass(frozen=True)
class NetworkConfig:
    """The network of a decoder.

    `context_length` is in tokens. `sliding_windows` holds one entry a layer: the number of tokens that a query sees,
    itself included, or None for all of them. `family_settings` is what only the model's own family reads. `part`: the
    sizes of heads and MLP are those of one rank's part of a model (models/split.py); None: of all of it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    family_settings: Any = None
    part: Part | None = None

    @property
    def table_rows(self) -> int:
        """Rows of the embedding and of the head: the vocabulary, or a rank's part of it."""
        if self.part is None:
            return self.vocab_size
        first, end = self.part.range(self.vocab_size)
        return end - first

    @property
    def n_ranks(self) -> int:
        """How many ranks have a part of the model."""
        return 1 if self.part is None else self.part.count

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer, in tokens, or None if every layer sees everything."""
        windows = [window for window in self.sliding_windows if window is not None]
        return min(windows) if windows else None

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, in tokens, or None."""
        return self.sliding_windows or (None,) * self.n_layers
