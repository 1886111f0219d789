"""Sliding windows as config.json states them."""

from __future__ import annotations

from fastkv.models.fields import Fields


def layer_windows(fields: Fields, window: int | None, first: int = 0) -> tuple[int | None, ...]:
    """Sliding window of each layer, in tokens (None: attends to everything).

    An explicit `layer_types` list decides; without one, layers from `first` on are windowed.
    """
    n_layers = fields.integer("num_hidden_layers")
    kinds = fields.get("layer_types", None)
    if kinds is None:
        return tuple(window if layer >= first else None for layer in range(n_layers))
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise fields.complain("layer_types", f"a list of {n_layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.complain("layer_types", "a list of full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def stated_window(fields: Fields) -> int | None:
    """`sliding_window`: null is none at all, and a missing key is the 4096 that the published classes assume."""
    if "sliding_window" in fields.values and "sliding_window" not in fields:
        return None
    return fields.integer("sliding_window", 4096)


def optional_windows(fields: Fields) -> tuple[int | None, ...]:
    """Sliding windows of the Qwen families: off unless `use_sliding_window`, and then from `max_window_layers` on."""
    window = stated_window(fields) if fields.flag("use_sliding_window", False) else None
    return layer_windows(fields, window, fields.integer("max_window_layers", 28, low=0))
