"""The products of a layer's prefill, over all its tokens: in chunks, into memory that every layer uses again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fastkv.cache.layer import Part
from fastkv.engine.workspace import Workspace
from fastkv.kernels.products import BLOCK
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama

# Tokens that projections and MLP work on at a time: the widest activation is a chunk's, not the prompt's.
CHUNK = 4096


class Projection:
    """What a layer computes for every token on its own. hidden: [B, T, E]; results last until the next layer's."""

    def __init__(self, model: Llama, workspace: Workspace) -> None:
        self._model, self._workspace = model, workspace

    def everything(self, layer: int, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Hq, T, D], k and v [B, Hkv, T, D] of all tokens."""
        block = self._model.blocks[layer]
        heads = self._room("heads", hidden, sum(block.self_attn.heads))
        for start, end in chunks(hidden):
            block.project(hidden[:, start:end], rope.at(start, end), out=heads[:, :, start:end])
        q, k, v = heads.split(block.self_attn.heads, dim=1)
        return q, k, v

    def keys(self, layer: int, hidden: Tensor, rope: Rope, n_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """k and v of all tokens, and q of the last `n_queries` alone."""
        block = self._model.blocks[layer]
        heads = self._room("heads", hidden, sum(block.self_attn.heads[1:]))
        for start, end in chunks(hidden):
            block.project_kv(hidden[:, start:end], rope.at(start, end), out=heads[:, :, start:end])
        k, v = heads.chunk(2, dim=1)
        return self.last_queries(layer, hidden, rope, n_queries), k, v

    def last_queries(self, layer: int, hidden: Tensor, rope: Rope, n_queries: int) -> Tensor:
        """q of the last `n_queries` tokens alone: [B, Hq, n, D], of memory of its own."""
        n_tokens = hidden.shape[1]
        first = max(0, n_tokens - n_queries)
        return self._model.blocks[layer].project_q(hidden[:, first:], rope.at(first, n_tokens))

    def queries(self, layer: int, hidden: Tensor, rope: Rope) -> Tensor:
        """q of all tokens."""
        q = self._room("queries", hidden, self._model.config.n_heads)
        for start, end in chunks(hidden):
            q[:, :, start:end] = self._model.blocks[layer].project_q(hidden[:, start:end], rope.at(start, end))
        return q

    def finish_(self, layer: int, hidden: Tensor, attended: Tensor) -> None:
        """Output projection and MLP, written into hidden; attended: [B, Hq, T, D]."""
        for start, end in chunks(hidden):
            self._model.blocks[layer].finish_(hidden[:, start:end], attended[:, :, start:end])

    def joined(self, before: Sequence[Part], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of earlier entries, n in every head, and after them the new k and v [B, Hkv, T, D].

        before: parts that together are all sequences and heads. Returns two tensors [B, Hkv, n + T, D].
        """
        batch, n_heads, n_new, head_dim = k.shape
        n_before = before[0].k.shape[2]
        shape = (batch, n_heads, n_before + n_new, head_dim)
        keys, values = (self._workspace.take(name, shape, like=k) for name in ("keys", "values"))
        for part in before:
            keys[part.sequences, part.heads, :n_before] = part.k
            values[part.sequences, part.heads, :n_before] = part.v
        keys[:, :, n_before:], values[:, :, n_before:] = k, v
        return keys, values

    def _room(self, name: str, hidden: Tensor, heads: int) -> Tensor:
        """[B, heads, T, D]."""
        shape = (hidden.shape[0], heads, hidden.shape[1], self._model.config.head_dim)
        return self._workspace.take(name, shape, like=hidden)


def chunks(hidden: Tensor) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk of the tokens of hidden [B, T, E], of at most CHUNK.

    On a CPU CHUNK of them, then a multiple of BLOCK, then what is left: multiples of BLOCK are what every prompt has in
    common (kernels/products.py). Elsewhere as even as can be, since a small rest would leave the device idle.
    """
    n_tokens = hidden.shape[1]
    if hidden.device.type != "cpu":
        count = max(1, -(-n_tokens // CHUNK))
        yield from ((n_tokens * index // count, n_tokens * (index + 1) // count) for index in range(count))
        return
    start = 0
    while start < n_tokens:
        left = n_tokens - start
        end = start + min(CHUNK, left // BLOCK * BLOCK or left)
        yield start, end
        start = end
