"""The parts that layers are built from: RMS norm, gated MLP, rotary embedding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv.kernels.int8 import dequantised
from fastkv.kernels.ranks import Across
from fastkv.models.linear import Stacked, Summed
from fastkv.models.rope_config import RopeConfig
from fastkv.models.rope_frequencies import attention_factor, inverse_frequencies

_SMALLEST_TABLE = 4096  # positions
_GROWING = threading.Lock()  # one for all tables: a module with a lock of its own could not be copied

Activation = Callable[[Tensor], Tensor]  # of each value alone


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Embedding(Across, nn.Module):
    """A row of a table for each token.

    scale: float32 [V] where the table is int8, whose rows it multiplies; dtype: of what it gives then. first: of ranks,
    the token whose row is the first one here; a token without a row here has zeros, to which the others' are added.
    """

    scale: Tensor | None = None
    dtype = torch.float32
    first = 0

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> [B, T, E]."""
        places = ids if self.ranks is None else (ids - self.first).clamp(0, self.weight.shape[0] - 1)
        if self.scale is None:
            rows = F.embedding(places, self.weight)
        else:
            rows = dequantised(self.weight[places], self.scale[places], self.dtype)
        if self.ranks is None:
            return rows
        return self.ranks.sum_(rows.masked_fill_((places != ids - self.first).unsqueeze(-1), 0))

    def into(self, out: Tensor, ids: Tensor) -> None:
        """The same, into `out` [B, T, E]."""
        if self.scale is None and self.ranks is None:
            torch.index_select(self.weight, 0, ids.flatten(), out=out.flatten(0, 1))
        else:
            out.copy_(self(ids))


class MLP(nn.Module):
    """Gated MLP (SwiGLU with the SiLU activation, arXiv 2002.05202). Gate and up are one matrix: rows [gate; up]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, activation: Activation = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = Stacked(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = Summed(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, T, I] each
        return self.down_proj(self.activation(gate) * up)


@dataclass(frozen=True)
class Rotation:
    """The rotation of a set of positions, broadcast over heads: cos and sin [B, 1, T, D].

    Both halves of D turn by the same angles; the first half of `sin` carries the minus of the rotation.
    """

    cos: Tensor
    sin: Tensor

    def at(self, start: int, end: int) -> Rotation:
        """The rotation of the tokens start … end - 1 alone."""
        return Rotation(self.cos[:, :, start:end], self.sin[:, :, start:end])

    def rotate(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Turn x [B, H, T, D], value i being paired with value i + D/2; the result goes into `out` if there is one."""
        low, high = x.chunk(2, dim=-1)
        # No `out=`: torch.compile cannot follow it into a tensor with gaps.
        turned = torch.mul(x, self.cos) if out is None else out.copy_(x).mul_(self.cos)
        return turned.addcmul_(torch.cat((high, low), dim=-1), self.sin)


@dataclass(frozen=True)
class Rope:
    """The rotations of a set of positions by each of the model's rotary embeddings. A layer uses one of them."""

    rotations: tuple[Rotation, ...]

    def at(self, start: int, end: int) -> Rope:
        """The rotations of the tokens start … end - 1 alone."""
        return Rope(tuple(rotation.at(start, end) for rotation in self.rotations))


def table_size(n_positions: int) -> int:
    """Positions of the table that is made for so many: doubling, so that few are made."""
    return max(_SMALLEST_TABLE, 1 << (n_positions - 1).bit_length())


class RotaryEmbedding(nn.Module):
    """Positions -> Rotation (arXiv 2104.09864), looked up in a table that is computed once.

    Angles are float32 whatever the model's dtype. The table grows when `reserve` asks for more positions; a lookup
    never does, so that it needs no look at the positions themselves.
    """

    inv_freq: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        # On the CPU by name: the model around it may be built on the meta device.
        self.register_buffer("inv_freq", inverse_frequencies(config, head_dim).cpu(), persistent=False)
        self.scale = attention_factor(config)
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def reserved(self) -> int:
        """Positions that the table covers: 0 … reserved - 1."""
        return 0 if self._table is None else self._table[0].shape[0]

    def reserve(self, n_positions: int, dtype: torch.dtype) -> None:
        """Let the table cover the positions below `n_positions`, in `dtype`. Threads may ask at the same time."""
        if self._covers(n_positions, dtype):
            return
        with _GROWING:
            if not self._covers(n_positions, dtype):  # another thread may have come first, and asked for more
                self._grow(max(n_positions, self.reserved), dtype)

    def _covers(self, n_positions: int, dtype: torch.dtype) -> bool:
        known = self._table
        return known is not None and known[0].shape[0] >= n_positions and known[0].dtype == dtype

    def _grow(self, n_positions: int, dtype: torch.dtype) -> None:
        count = table_size(n_positions)
        with torch.inference_mode(False):  # a table made while generating can be trained with later
            positions = torch.arange(count, device=self.inv_freq.device)
            angles = positions[:, None].float() * self.inv_freq  # [P, D // 2]
            cos, sin = ((values * self.scale).to(dtype) for values in (angles.cos(), angles.sin()))
            self._table = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def forward(self, positions: Tensor) -> Rotation:
        """positions: int64 [B, T], the tokens' original positions, all of them reserved."""
        assert self._table is not None, "reserve comes first"
        cos, sin = self._table
        return Rotation(cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))

    def range(self, start: int, end: int) -> Rotation:
        """The rotation of the positions start … end - 1, all of them reserved: a view of the table, [1, 1, T, D]."""
        assert self._table is not None, "reserve comes first"
        cos, sin = self._table
        return Rotation(cos[None, None, start:end], sin[None, None, start:end])

    def undone(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, n, D] as it was before `Rotation.rotate` at positions int64 [B, H or 1, n]: float32.

        Needs no table. What the rotation scales (yarn) is scaled back.
        """
        angles = positions[..., None].float() * self.inv_freq  # [B, H or 1, n, D // 2]
        cos, sin = angles.cos().div_(self.scale), angles.sin_().div_(self.scale)
        low, high = x.float().chunk(2, dim=-1)
        return torch.cat((low * cos + high * sin, high * cos - low * sin), dim=-1)

    def mean(self, first: int, count: int) -> Tensor:
        """The mean of the rotations of the positions first … first + count - 1: float32 [D, D], for column vectors."""
        positions = torch.arange(first, first + count, device=self.inv_freq.device)
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = (torch.diag(values.mean(dim=0) * self.scale) for values in (angles.cos(), angles.sin()))
        return torch.cat((torch.cat((cos, -sin), dim=1), torch.cat((sin, cos), dim=1)), dim=0)


class RotaryEmbeddings(nn.Module):
    """Positions -> Rope: all rotary embeddings of a model (`each`), whose tables grow together."""

    def __init__(self, configs: Sequence[RopeConfig], head_dim: int) -> None:
        super().__init__()
        self.each = [RotaryEmbedding(config, head_dim) for config in configs]
        self.embeddings = nn.ModuleList(self.each)

    @property
    def reserved(self) -> int:
        """Positions that the tables cover: 0 … reserved - 1."""
        return self.each[0].reserved

    def reserve(self, n_positions: int, dtype: torch.dtype) -> None:
        """Let the tables cover the positions below `n_positions`, in `dtype`."""
        for embedding in reversed(self.each):  # the first one, which `reserved` asks, when the others are there
            embedding.reserve(n_positions, dtype)

    @property
    def tables(self) -> tuple[object, ...]:
        """What lookups read now, to keep it alive: a table that grows is another one."""
        return tuple(embedding._table for embedding in self.each)

    def forward(self, positions: Tensor) -> Rope:
        """positions: int64 [B, T], the tokens' original positions, all of them reserved."""
        return Rope(tuple(map(RotaryEmbedding.forward, self.each, [positions] * len(self.each))))

    def range(self, start: int, end: int) -> Rope:
        """The rotations of the positions start … end - 1, all of them reserved: views of the tables."""
        return Rope(tuple(embedding.range(start, end) for embedding in self.each))
