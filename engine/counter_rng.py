"""Random numbers without a state: each is a function of (seed, step). Knows nothing of tokens.

A counter-based generator has no state to carry along, so a sequence gets the same numbers alone and in any batch, and a
captured CUDA graph needs nothing but two integers of each sequence. Integer arithmetic alone decides the numbers: they
are the same on a CPU and on a GPU. Not for cryptography.

Each seed begins its own walk through the 64-bit integers, in steps of an odd constant; each point is mixed until its
bits look random: the construction of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    """The int64 with the bits of this unsigned constant."""
    return constant - 2**64 if constant >= 2**63 else constant


_STRIDE = _signed(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def stream_of(seed: Tensor) -> Tensor:
    """Where the numbers of each seed begin. int64 [...] -> int64 [...]; to be made once, for `uniform`."""
    return _mix(seed + _STRIDE)


def uniform(stream: Tensor, step: Tensor) -> Tensor:
    """Number `step` of each stream: int64 [...] and [...] -> float64 [...] in [0, 1), a multiple of 2**-53."""
    return _shift_right(_mix(stream + step * _STRIDE), 11).to(torch.float64) * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    """One to one, each bit of the result depending on every bit of `bits`. Products wrap around at 2**64."""
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Zeros come in from the left, where `>>` on int64 repeats the sign."""
    return (bits >> count) & (2 ** (64 - count) - 1)
