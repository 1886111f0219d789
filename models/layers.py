"""The parts that every layer shares: RMS norm, gated MLP, rotary embedding with its scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv.models.linear import Linear
from fastkv.models.rope_config import RopeConfig

_SMALLEST_TABLE = 4096  # positions


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """Gated MLP (SwiGLU, arXiv 2002.05202). Gate and up are one matrix: rows [gate; up]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, T, I] each
        return self.down_proj(F.silu(gate) * up)


@dataclass(frozen=True)
class Rope:
    """The rotation of a set of positions, broadcast over heads: cos and sin [B, 1, T, D].

    Both halves of D turn by the same angles; the first half of `sin` carries the minus of the rotation.
    """

    cos: Tensor
    sin: Tensor

    def at(self, start: int, end: int) -> Rope:
        """The rotation of the tokens start … end - 1 alone."""
        return Rope(self.cos[:, :, start:end], self.sin[:, :, start:end])

    def rotate(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Turn x [B, H, T, D], value i being paired with value i + D/2; the result goes into `out` if there is one."""
        low, high = x.chunk(2, dim=-1)
        return torch.mul(x, self.cos, out=out).addcmul_(torch.cat((high, low), dim=-1), self.sin)


class RotaryEmbedding(nn.Module):
    """Positions -> Rope (arXiv 2104.09864), looked up in a table that is computed once.

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
        """Let the table cover the positions below `n_positions`, in `dtype`."""
        known = self._table
        if known is not None and known[0].shape[0] >= n_positions and known[0].dtype == dtype:
            return
        count = max(_SMALLEST_TABLE, 1 << (n_positions - 1).bit_length())  # doubling: few are made
        with torch.inference_mode(False):  # a table made while generating can be trained with later
            positions = torch.arange(count, device=self.inv_freq.device)
            angles = positions[:, None].float() * self.inv_freq  # [P, D // 2]
            cos, sin = ((values * self.scale).to(dtype) for values in (angles.cos(), angles.sin()))
            self._table = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def forward(self, positions: Tensor) -> Rope:
        """positions: int64 [B, T], the tokens' original positions, all of them reserved."""
        assert self._table is not None, "reserve comes first"
        cos, sin = self._table
        return Rope(cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))

    def first(self, n_tokens: int) -> Rope:
        """The rotation of the positions 0 … n_tokens - 1: a view of the table, [1, 1, T, D]."""
        assert self._table is not None, "reserve comes first"
        cos, sin = self._table
        return Rope(cos[None, None, :n_tokens], sin[None, None, :n_tokens])


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair: float32 [head_dim // 2], stretched as `config.scaling` says."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / config.theta**exponents
    if config.scaling == "linear":
        return inv_freq / config.factor
    if config.scaling == "llama3":
        return _llama3_frequencies(config, inv_freq)
    if config.scaling == "yarn":
        return _yarn_frequencies(config, inv_freq, head_dim)
    return inv_freq


def attention_factor(config: RopeConfig) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn (arXiv 2309.00071, §3.4)."""
    if config.scaling != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale is not None and config.mscale_all_dim is not None:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)


def _llama3_frequencies(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: slow pairs are divided by `factor`, fast ones kept, and those between are blended."""
    # In this order of operations: at position 131 071 another rounding of a frequency can be seen in the angle.
    turns = config.original_context / (2 * math.pi / inv_freq)  # full turns over the original length
    share = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = share.clamp(0, 1)
    return (1 - kept) * inv_freq / config.factor + kept * inv_freq


def _yarn_frequencies(config: RopeConfig, inv_freq: Tensor, head_dim: int) -> Tensor:
    """Yarn's "NTK by parts": a linear ramp over the pairs, from kept (fast) to divided by `factor` (slow)."""

    def pair_turning(turns: float) -> float:
        # The (fractional) pair that makes so many turns over the original length.
        wavelength = config.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return slow * inv_freq / config.factor + (1 - slow) * inv_freq
