"""Rotary settings as config.json gives them: the old `rope_theta` + `rope_scaling` and the new `rope_parameters`."""

from __future__ import annotations

from dataclasses import dataclass

from fastkv.errors import FastKVError, brief
from fastkv.models.fields import Fields

SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding (arXiv 2104.09864) and how it is stretched beyond its trained length.

    `original_context` is the length before stretching, in tokens. The `yarn` fields are those of arXiv 2309.00071;
    `attention_factor` None means that it follows from `factor`, `mscale` and `mscale_all_dim`.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(fields: Fields, context_length: int) -> RopeConfig:
    """The rotary settings of a config.json; FastKVError for a scaling that no supported family ships."""
    section = _section(fields)
    if any(isinstance(value, dict) for value in section.values.values()):
        raise FastKVError(f"{section.source}: a rotary embedding per layer type is not supported")
    return read_rope_section(section, fields, context_length)


def read_rope_section(section: Fields, fields: Fields, context_length: int) -> RopeConfig:
    """The rotary settings of one section of a config.json; what it leaves out may stand beside it, in `fields`."""
    _reject_unsupported(fields)
    _reject_unsupported(section)
    theta = section.number("rope_theta", fields.number("rope_theta", 10_000.0))
    scaling = section.get("rope_type", section.get("type", "default"))
    if scaling not in SCALINGS:
        raise FastKVError(
            f"{section.source}: rotary scaling {brief(scaling)} is not supported; known are {', '.join(SCALINGS)}"
        )
    if scaling == "default":
        return RopeConfig(theta)
    if scaling == "linear":
        return RopeConfig(theta, scaling, section.number("factor"))
    # An original length beside the section wins over one inside it, as it does in the published code.
    inside = section.integer("original_max_position_embeddings", context_length)
    original = fields.integer("original_max_position_embeddings", inside)
    if scaling == "llama3":
        return _read_llama3(section, theta, original)
    return _read_yarn(section, theta, original, context_length)


def _section(fields: Fields) -> Fields:
    """Where a file has both spellings, the old `rope_scaling` holds, as in the published code."""
    for key in ("rope_scaling", "rope_parameters"):
        section = fields.section(key)
        if section is not None and section.values:
            return section
    return Fields({}, fields.source)


def _reject_unsupported(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise FastKVError(f"{fields.source}: partial_rotary_factor is not supported (only full rotation)")


def _read_llama3(section: Fields, theta: float, original: int) -> RopeConfig:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.complain("high_freq_factor", f"above low_freq_factor ({low:g})")
    return RopeConfig(theta, "llama3", section.number("factor"), original, low, high)


def _read_yarn(section: Fields, theta: float, original: int, context_length: int) -> RopeConfig:
    if theta <= 1:
        raise FastKVError(f"{section.source}: rope_theta must be above 1 with yarn, not {theta}")

    def optional(key: str) -> float | None:
        # A zero here means "not set" in published checkpoints.
        return section.number(key) if section.get(key, 0) != 0 else None

    return RopeConfig(
        theta,
        "yarn",
        factor=section.number("factor", context_length / original),
        original_context=original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=section.flag("truncate", True),
    )
