"""How fast a rotary embedding turns each pair: its frequencies, and the scalings that stretch them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkv.models.rope_config import RopeConfig

_LARGEST = torch.finfo(torch.float32).max
_LARGEST_FACTOR = torch.finfo(torch.float16).max  # cosines and sines are kept in the model's dtype


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


def is_finite(config: RopeConfig, head_dim: int, context_length: int) -> bool:
    """Whether the tables of all positions below `context_length` are made of numbers."""
    try:
        largest = inverse_frequencies(config, head_dim).abs().amax().item()  # NaN where any is
        return largest * context_length <= _LARGEST and 0 < attention_factor(config) <= _LARGEST_FACTOR
    except (ArithmeticError, ValueError):  # of logarithms and roundings of numbers out of reach
        return False


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
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    slow = ramp.clamp(0, 1)
    return slow * inv_freq / config.factor + (1 - slow) * inv_freq
