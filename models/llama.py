"""The network of every supported family: embed, rope, layers, head. No loop over a request, no cache, no policy.

What a family builds otherwise it says itself (family.py); one layer is a Block (block.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv.kernels import int4
from fastkv.kernels.ranks import Across
from fastkv.models.block import Block
from fastkv.models.catalogue import family_of
from fastkv.models.config import ModelConfig
from fastkv.models.layers import Embedding, Rope, RotaryEmbeddings
from fastkv.models.linear import Linear

JUDGED = 4  # tokens of a step that judges drafted ones, where it is compiled: what products of few rows are best at

LayerAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # of a layer: q, k and v -> as q


class RowLayers(Protocol):
    """All layers and the head for one token of one sequence, or JUDGED: with attention over the cache, or around it."""

    def prepare(self, count: int = 1, kv_dtype: str | None = None) -> None:
        """Make what the usual step of so many tokens needs, so that the first one does not wait for it.

        kv_dtype: and what one token over such entries does, "int8" or "int4".
        """

    def logits(self, hidden: Tensor, rope: Rope, entries: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """hidden [1, T, E] -> logits float32 [1, T, V].

        entries: k and v [1, Hkv, n, D] of each layer. The last T are the tokens' own, and are written here. Of one
        token packed entries may come before them (QuantisedLayer.row).
        """

    def logits_around(self, hidden: Tensor, rope: Rope, attend: LayerAttention) -> Tensor:
        """The same for one token, with attention of any kind, which gets k and v to keep."""


class Llama(Across, nn.Module):
    """Embedding, blocks and head of any supported family. row: the layers for a single row, where there are others.

    ranks: those that have a part of it each (models/split.py); None: this is all of it.
    """

    row: RowLayers | None = None
    _dtype: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.family = family_of(config.architecture)
        # Not nn.Embedding: drawing its values on the meta device makes torch import symbolic mathematics.
        self.embed_tokens = Embedding(config.table_rows, config.hidden_size)
        # The layers, first to last, as what they are: ModuleList forgets the type.
        self.blocks: Sequence[Block] = [self.family.block(config, layer) for layer in range(config.n_layers)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = self.family.final_norm(config)
        self.lm_head = Linear(config.hidden_size, config.table_rows, bias=False)
        self.rotary = RotaryEmbeddings(self.family.rotary_embeddings(config), config.head_dim)
        self.tie()

    def tie(self) -> None:
        """Let the head be the embedding, where the checkpoint says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
            self.lm_head.scale = self.embed_tokens.scale

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._dtype or self.embed_tokens.weight.dtype

    def computes_in(self, dtype: torch.dtype) -> None:
        """Say it, where the weights do not: they may be int8."""
        self._dtype = self.embed_tokens.dtype = dtype

    @property
    def precision(self) -> str:
        """The dtype as torch names it, and whether the weights are something else: "float32, int8 weights"."""
        name = str(self.dtype).removeprefix("torch.")
        return name if self.lm_head.scale is None else f"{name}, int8 weights"

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """ids int64 [B, T] -> hidden [B, T, E], in `out` if there is one."""
        if out is None:
            hidden = self.embed_tokens(ids)
        else:
            self.embed_tokens.into(out, ids)
            hidden = out
        change = self.family.embedded_
        return hidden if change is None else change(self.config, hidden)

    def between(self, layer: int, hidden: Tensor, attended: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """What lies between two attentions: the rest of `layer`, written into hidden, then q, k and v of the next."""
        self.blocks[layer].finish_(hidden, attended)
        return self.blocks[layer + 1].project(hidden, rope)

    def last(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What comes after the last attention: hidden [B, T, E] -> logits float32 [B, T, V]."""
        self.blocks[-1].finish_(hidden, attended)
        return self.head(hidden)

    @property
    def makes_floats(self) -> int:
        """Bytes of weights that a product with 4-bit ones makes floats of, and lets go; 0 where there are none."""
        has_codes = self.blocks[0].self_attn.o_proj.weight.dtype == torch.int32
        return int4.scratch_bytes(self.device) if has_codes else 0

    def reserve(self, n_positions: int) -> None:
        """Let `rope` know the positions below `n_positions`."""
        self.rotary.reserve(n_positions, self.dtype)

    def rope(self, positions: Tensor) -> Rope:
        """positions int64 [B, T], the original ones, all reserved -> the rotation of those positions."""
        return self.rotary(positions)

    def rope_of_range(self, first: int, n_tokens: int) -> Rope:
        """The rotation of the positions first … first + n_tokens - 1, reserved here: a view of the table."""
        self.reserve(first + n_tokens)
        return self.rotary.range(first, first + n_tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] -> logits float32 [..., V]."""
        logits = self.lm_head(self.norm(hidden)).float()
        if self.ranks is not None:
            logits = self._of_all_ranks(logits)
        change = self.family.logits_
        return logits if change is None else change(self.config, logits)

    def _of_all_ranks(self, logits: Tensor) -> Tensor:
        """[..., rows] of this rank's part of the vocabulary -> [..., V]. The last ranks may have fewer rows."""
        assert self.ranks is not None
        missing = -(-self.config.vocab_size // self.ranks.count) - logits.shape[-1]
        padded = F.pad(logits, (0, missing)) if missing else logits
        return self.ranks.join(padded, dim=-1)[..., : self.config.vocab_size]
