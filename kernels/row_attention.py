"""Attention of one query for each head on a CPU: the ways that torch has, and which of them is taken.

The query heads of a KV head are the rows of one product, so that K and V are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels.calibration import Way, calibration, is_on
from fastkv.kernels.memory import zeros

# (rows [B, Hkv, G, D], k and v [B, Hkv, n, D]) -> [B, Hkv, G, D]
RowAttention = Callable[[Tensor, Tensor, Tensor], Tensor]

_COLD = 32 << 20  # bytes of entries that are read in turn while a way is timed
_MOST = 64  # layers' worth of them
_ROOM = 64  # entries
_LONG = 13  # 8,192 entries: what is timed takes no more memory than those
_chosen: dict[tuple[int | torch.dtype, ...], tuple[str, RowAttention]] = {}


def chosen_way(rows: Tensor, k: Tensor) -> tuple[str, RowAttention]:
    """Which of `ways_of` is taken for rows [B, Hkv, G, D] and entries k [B, Hkv, n, D]: its name, and itself.

    Rows attend to all entries.
    """
    _, n_kv_heads, n_rows, head_dim = rows.shape
    size = min(k.shape[2].bit_length(), _LONG)  # size_class, without a call in each layer of a step
    key = (n_kv_heads, n_rows, head_dim, size, rows.dtype, torch.get_num_threads())
    known = _chosen.get(key)
    if known is None:
        known = _chosen[key] = _choose(rows, k)
    return known


def size_class(n_entries: int) -> int:
    """A choice holds for numbers of entries below the next power of two, the same for all long caches: its exponent."""
    return min(n_entries.bit_length(), _LONG)


def told(rows: Tensor, k: Tensor) -> str:
    """What a choice is about, in words."""
    _, n_kv_heads, n_rows, head_dim = rows.shape
    dtype = str(rows.dtype).removeprefix("torch.")
    return f"{n_kv_heads} x {n_rows} heads of {head_dim}, {1 << size_class(k.shape[2])} entries, {dtype}"


def forget() -> None:
    """Choose anew when asked the next time."""
    _chosen.clear()


def ways_of(n_rows: int) -> dict[str, RowAttention]:
    """The ways for so many query heads to a KV head, by name."""
    ways: dict[str, RowAttention] = {"fused": F.scaled_dot_product_attention, "products": _products}
    return ways if n_rows > 1 else {**ways, "twice": _twice}


class CausalMasks:
    """The masks of `of_last_tokens` in one step: its layers mostly have as many entries, and share one.

    The latest is held of each window, for layers with and without one may take turns.
    """

    def __init__(self) -> None:
        self._latest: dict[int | None, Tensor] = {}

    def of(self, rows: Tensor, n_entries: int, count: int, window: int | None) -> Tensor:
        """[G T, n], for rows [B, Hkv, G T, D] of `count` tokens, T, over n entries, of a layer with this window."""
        mask = self._latest.get(window)
        if mask is None or mask.shape[1] != n_entries:
            self._latest.pop(window, None)  # not both at once
            mask = causal_mask(count, n_entries, rows, window).repeat(rows.shape[2] // count, 1)
            self._latest[window] = mask
        return mask


def of_last_tokens(
    rows: Tensor, k: Tensor, v: Tensor, count: int, window: int | None = None, masks: CausalMasks | None = None
) -> Tensor:
    """The queries of the last `count` of n entries, T, each over the entries up to its own, or the nearest `window`.

    rows [B, Hkv, G T, D], the tokens of a query head after one another; k and v [B, Hkv, n, D]. -> [B, Hkv, G T, D].
    torch's attention of a few queries reads K and V once for each query head, or holds all weights; this once.
    masks: of the step, where there are more layers.
    """
    mask = (CausalMasks() if masks is None else masks).of(rows, k.shape[2], count, window)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)


def causal_mask(count: int, n_entries: int, like: Tensor, window: int | None = None) -> Tensor:
    """What is added to the logits of the last `count` of n entries, T: 0 or -inf, [T, n], in the dtype of `like`."""
    keys = torch.arange(n_entries, device=like.device)
    places = keys[n_entries - count :].unsqueeze(1)
    hidden = keys > places
    if window is not None:
        hidden = hidden | (keys <= places - window)
    return like.new_zeros(hidden.shape).masked_fill(hidden, float("-inf"))


def two_rows_are_faster(q: Tensor) -> bool:
    """Whether attention of one row takes longer than that of the same row twice.

    On a CPU so for short dtypes (benchmarks/choices.py). On a GPU so, too: flash attention splits the entries over the
    multiprocessors only where there are several rows for each head.
    """
    return q.device.type == "cuda" or q.dtype != torch.float32


def _choose(rows: Tensor, k: Tensor) -> tuple[str, RowAttention]:
    n_rows = rows.shape[2]
    ways = ways_of(n_rows)
    name = "twice" if n_rows == 1 and two_rows_are_faster(rows) else "fused"
    if is_on():
        name = calibration().choose(f"attention of {told(rows, k)}", name, ways, lambda: _timed(rows[:1], k, ways))
    return name, ways[name]


def _timed(rows: Tensor, k: Tensor, ways: dict[str, RowAttention]) -> dict[str, Way]:
    """What is timed: one query over the entries of a number of layers."""
    entries, q = cold_entries(rows, k), torch.full_like(rows, 0.1)

    def attend(way: RowAttention) -> None:
        for k, v in entries:
            way(q, k, v)

    return {name: partial(attend, way) for name, way in ways.items()}


def cold_entries(rows: Tensor, k: Tensor) -> list[tuple[Tensor, Tensor]]:
    """k and v [1, Hkv, n, D] of a number of layers, so many that they come from memory, for the size class of k."""
    _, n_kv_heads, _, head_dim = rows.shape
    n = 1 << size_class(k.shape[2])
    entry = 2 * n_kv_heads * head_dim * rows.dtype.itemsize
    layers = min(_MOST, max(1, _COLD // (n * entry)))
    # As in a cache, which has room for more: the heads do not touch, and some products would copy them.
    both = zeros((2, layers, 1, n_kv_heads, n + _ROOM, head_dim), rows.dtype, rows.device).fill_(0.1)[..., :n, :]
    return list(zip(both[0], both[1], strict=True))


def _products(rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A product, a softmax, a product."""
    logits = (rows * rows.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.softmax(dim=-1) @ v


def _twice(rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One row, given twice."""
    return F.scaled_dot_product_attention(rows.expand(-1, -1, 2, -1), k, v)[:, :, :1]
