"""Whether two loaded models are the same: a checksum of what a model computes, with a few of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from fastkv.models.llama import Llama
from fastkv.models.network_config import NetworkConfig

_EACH = 64  # values of each parameter that are looked at
# What says how far a model may be used, not what it computes.
_ASIDE = {"context_length"}
_NETWORK = [field for field in dataclasses.fields(NetworkConfig) if field.name not in _ASIDE]


def fingerprint(model: Llama) -> str:
    """16 characters: alike for a model at another place or on another device, different for a fine-tune of it.

    It is of the weights as they are loaded, random ones too: another dtype, or int8 weights, give another one. 64
    values of every parameter are looked at, whatever its size; a change of other values alone goes unseen.
    """
    digest = hashlib.sha256(_told(model.config, _NETWORK).encode())
    samples = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        # An odd step: one that is a multiple of the row would stay in a single column.
        samples.append(flat[:: (len(flat) // _EACH) | 1][:_EACH].float())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _told(config: Any, fields: Any) -> str:
    """The fields that are not at their defaults, so that one that is added later changes nothing for older models."""
    told = []
    for field in fields:
        value = getattr(config, field.name)
        if value != field.default:
            nested = dataclasses.is_dataclass(value)
            told.append(f"{field.name}={_told(value, dataclasses.fields(value)) if nested else repr(value)}")
    return f"({', '.join(told)})"
