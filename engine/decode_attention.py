"""Attention of a decode step: new tokens are appended to a layer's entries, and attend to them.

One protocol, three ways. `EagerAttention` goes by the host's counts, and runs anywhere. A captured CUDA graph can bake
in no count, so there the device alone knows how many entries are live: `MaskedAttention` is plain, and takes any
layout; `VarlenAttention` is the fast one, for layers that are one flat memory. Tests hold the three together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.bounded import BoundedCache
from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import EntryShape
from fastkv.cache.pool import KVPool
from fastkv.engine.attention import attend_parts, without_cudnn
from fastkv.kernels.packed_loops import has_loops
from fastkv.kernels.row_attention import CausalMasks, two_rows_are_faster

Windows = Sequence[int | None]  # the sliding window of each layer, in tokens


class StepAttention(Protocol):
    """Attention of one decode step of some sequences of a pool."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v [B, Hkv, T, D], and let q [B, Hq, T, D] attend to all entries up to its own. -> as q."""


def can_be_one_row(pool: KVPool, windows: Windows) -> bool:
    """Whether one token of a sequence in this pool can be a step of RowLayers (models/llama.py)."""
    if pool.layout.per_head:
        return False
    return pool.layout.kv_dtype is None or has_loops(pool.shape.head_dim, windows)


class EagerAttention:
    """For the sequences of these slots, given as runs of neighbours, T tokens each; reads what the host counts."""

    def __init__(self, pool: KVPool, runs: Sequence[range], n_new: int, windows: Windows) -> None:
        self._pool, self._runs, self.n_new, self._windows = pool, runs, n_new, windows
        self.shared = pool.shared  # see there
        self._places = list(map(pool.places, runs, [n_new] * len(runs)))
        self._masks = CausalMasks() if n_new > 1 else None

    @property
    def is_one_row(self) -> bool:
        """Whether this is one sequence, all of whose heads are equally long, each layer with its own entries.

        Several tokens: and no layer has a window, within which each of them would see others, nor packed entries.
        """
        runs, layout = self._runs, self._pool.layout
        if len(runs) != 1 or len(runs[0]) != 1 or self.shared:
            return False
        if layout.kv_dtype is None:
            return not layout.per_head and (self.n_new == 1 or not any(self._windows))
        return self.n_new == 1 and can_be_one_row(self._pool, self._windows)

    def entries(self) -> list[tuple[Tensor, ...]]:
        """Of one row: what it attends to in each layer, k and v [1, Hkv, n, D]. Its tokens' own it writes.

        Packed entries come before these: see QuantisedLayer.row.
        """
        if self._pool.layout.kv_dtype is not None:
            return [storage.row(self._runs[0].start) for storage in self._pool.layers]
        found: list[tuple[Tensor, ...]] = []
        for storage, window in zip(self._pool.layers, self._windows, strict=True):
            (part,) = storage.read(self._runs[0], self.n_new)
            k, v = part.k, part.v
            found.append((k, v) if window is None else (k[:, :, -window:], v[:, :, -window:]))
        return found

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        storage, window = self._pool.layers[layer], self._windows[layer]
        if len(self._runs) == 1:
            storage.write(self._runs[0], k, v, self._places[0][layer])
            if self._pool.layout.kv_dtype is not None:
                return storage.attend(self._runs[0], q, window)
            return attend_parts(storage.read(self._runs[0], self.n_new), q, window, masks=self._masks)
        attended, first = [], 0
        for run, places in zip(self._runs, self._places, strict=True):
            part = slice(first, first + len(run))
            storage.write(run, k[part], v[part], places[layer])
            if self._pool.layout.kv_dtype is None:
                attended.append(attend_parts(storage.read(run, self.n_new), q[part], window, masks=self._masks))
            else:
                attended.append(storage.attend(run, q[part], window))
            first = part.stop
        return torch.cat(attended)


class ObservedAttention:
    """As `attention`; `bounded`, caches by their row of the batch, are told what each query attends to.

    The kernels that attend give no weights, so these are computed once more, from few entries.
    """

    def __init__(self, attention: StepAttention, bounded: Mapping[int, BoundedCache]) -> None:
        self._attention, self._bounded = attention, bounded

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = self._attention(layer, q, k, v)
        for row, cache in self._bounded.items():
            cache.observe(layer, q[row : row + 1])
        return attended


class RecordedAttention:
    """As `attention`; `recorded` gets k and v of each layer, one after another."""

    def __init__(self, attention: EagerAttention, recorded: list[tuple[Tensor, Tensor]]) -> None:
        self._attention, self._recorded = attention, recorded

    @property
    def is_one_row(self) -> bool:
        """See EagerAttention."""
        return self._attention.is_one_row

    def entries(self) -> list[tuple[Tensor, ...]]:
        """See EagerAttention. What is recorded are views, which hold k and v when the layers have run."""
        found, own = self._attention.entries(), slice(-self._attention.n_new, None)
        self._recorded += [(k[:, :, own], v[:, :, own]) for *_, k, v in found]
        return found

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._recorded.append((k, v))
        return self._attention(layer, q, k, v)


class MaskedAttention:
    """One token for each of the first `n` slots: `spans[l]` entries of each head are read, a mask hides the others."""

    def __init__(self, pool: KVPool, n: int, spans: Sequence[int], windows: Windows) -> None:
        self._pool, self._slots, self._spans, self._windows = pool, range(n), spans, windows
        self._places = pool.places(self._slots, 1)

    def begin(self) -> None:
        """Once a step, before the first layer: read the counts anew."""
        self._places.copy_(self._pool.places(self._slots, 1))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.append(layer, k, v)
        return self.attend(layer, q)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """One token's k and v [n, Hkv, 1, D] of each slot."""
        self._pool.layers[layer].append(self._slots, k, v, self._places[layer])

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [n, Hq, 1, D] over the live entries, and one more, which was appended in this step. -> as q."""
        k, v = self._pool.layers[layer].padded(self._slots, self._spans[layer])
        last = self._pool.lengths[layer, : len(self._slots), :, None, None]
        entries = torch.arange(k.shape[2], device=q.device)
        visible = entries <= last  # [B, Hkv, 1, span]
        window = self._windows[layer]
        if window is not None:
            visible &= entries > last - window
        rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]: the queries of a KV head in one product
        with without_cudnn(q.device):
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=visible).flatten(1, 2).unsqueeze(2)


class VarlenAttention:
    """Flash attention for sequences of different lengths (torch.nn.attention.varlen), for layers with flat memory.

    Each KV head of each slot is a sequence of its own, with one token of G query heads and one key head: so the entries
    need no copy, heads may differ in length, and the kernel splits a long sequence over the GPU. Layers with a sliding
    window are left to MaskedAttention.
    """

    def __init__(self, pool: KVPool, n: int, spans: Sequence[int], windows: Windows) -> None:
        self._attend = _varlen_function()
        self._masked = MaskedAttention(pool, n, spans, windows)
        self._pool, self._n, self._spans, self._windows = pool, n, spans, windows
        n_layers, _, n_kv_heads = pool.lengths.shape
        device, integer = pool.device, torch.int32
        self._queries = torch.arange(n * n_kv_heads + 1, dtype=integer, device=device)
        # Where the entries of each slot begin, of all that a layer has, and where those of the last one end: [L, n + 1]
        rows = torch.tensor([layer.rows for layer in pool.layers], dtype=integer, device=device)
        self._slots = torch.arange(n + 1, dtype=integer, device=device) * rows.unsqueeze(1)
        self._starts = torch.zeros(n_layers, n * n_kv_heads + 1, dtype=integer, device=device)
        self._starts[:, -1] = self._slots[:, -1]
        self._live = torch.zeros(n_layers, n * n_kv_heads, dtype=integer, device=device)

    def begin(self) -> None:
        """As MaskedAttention.begin."""
        self._masked.begin()
        shape = (self._n, self._pool.lengths.shape[2])
        self._live.unflatten(1, shape).copy_(self._pool.lengths[:, : self._n]).add_(1)
        starts = self._starts[:, :-1].unflatten(1, shape)
        starts.copy_(self._pool.starts[:, : self._n]).add_(self._slots[:, :-1].unsqueeze(2))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._masked.append(layer, k, v)
        return self.attend(layer, q)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """As MaskedAttention.attend."""
        if self._windows[layer] is not None:
            return self._masked.attend(layer, q)
        flat = self._pool.layers[layer].flat()
        assert flat is not None, "a layer without flat memory"
        head_dim, n_kv_heads = q.shape[-1], self._pool.shape.n_kv_heads
        rows = q.reshape(self._n * n_kv_heads, -1, head_dim)  # [n * Hkv, G, D]
        n_rows = rows.shape[1]
        if n_rows == 1 and two_rows_are_faster(q):
            rows = rows.expand(-1, 2, -1).contiguous()
        k, v = (memory[: self._n * self._pool.layers[layer].rows, None] for memory in flat)
        span, starts = self._spans[layer], self._starts[layer]
        attended = self._attend(rows, k, v, self._queries, starts, 1, span, seqused_k=self._live[layer])
        return attended[:, :n_rows].reshape(q.shape)


def _varlen_function() -> Callable[..., Any]:
    """torch's varlen attention, in the form that this version has: with `seqused_k`, for grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _flash_forward
    known = inspect.signature(varlen_attn).parameters
    if "seqused_k" not in known:  # before 2.12; the kernel below it has had it for longer
        return _flash_forward
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_of_keys: Tensor, max_q: int, max_k: int, seqused_k: Tensor
) -> Tensor:
    """The kernel itself, no dropout and no mask."""
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, starts, starts_of_keys, max_q, max_k, 0.0, False, False, seqused_k=seqused_k)[0]


GraphAttention = MaskedAttention | VarlenAttention


def graph_attention(pool: KVPool, n_heads: int) -> tuple[type[GraphAttention], str | None]:
    """The faster of the two that a graph can hold, and why it is not VarlenAttention (None: it is).

    Versions of torch and devices differ in what varlen attention takes, so it is tried: on a small pool of the same
    kind, against the plain one.
    """
    if pool.device.type != "cuda":
        return MaskedAttention, "varlen attention runs on a GPU"
    if pool.shape.dtype == torch.float32:
        return MaskedAttention, "varlen attention computes in bfloat16 or float16"
    if any(layer.flat() is None for layer in pool.layers):
        return MaskedAttention, f"varlen attention needs flat memory, which {pool.layout.__name__} has not"
    try:
        if not _agree_on_a_sample(pool.shape, n_heads, pool.device):
            return MaskedAttention, "varlen attention gives other results here"
        return VarlenAttention, None
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return MaskedAttention, f"no varlen attention ({str(error).splitlines()[0]})"


@torch.inference_mode()
def _agree_on_a_sample(shape: EntryShape, n_heads: int, device: torch.device) -> bool:
    """Whether both attentions give the same for a sample whose dead entries would be noticed."""
    sample = KVPool(DenseLayer, [96], 1, shape, device)
    generator = torch.Generator(device).manual_seed(0)
    flat = sample.layers[0].flat()
    assert flat is not None
    for memory in flat:
        memory.normal_(generator=generator)
    sample.lengths.fill_(40)
    q = torch.empty(1, n_heads, 1, shape.head_dim, dtype=shape.dtype, device=device).normal_(generator=generator)
    varlen, masked = (kind(sample, 1, [64], [None]) for kind in (VarlenAttention, MaskedAttention))
    varlen.begin()
    difference = varlen.attend(0, q) - masked.attend(0, q)
    return bool(difference.abs().max() < 0.05)  # values are about 1 / sqrt(41); a dead entry too many shows at 0.1
