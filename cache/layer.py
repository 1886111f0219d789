"""What the engine may ask of one layer's storage of KV entries, whatever its layout is.

An entry is one token's K and V in one KV head. A slot is the place of one sequence in a pool (cache/pool.py). Two
counts say how many entries there are. The host's is an int for each slot, that of the longest head: it plans sizes.
The device's is a tensor for each slot and head: it is what a captured CUDA graph reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fastkv.cache.selection import PerHead
from fastkv.kernels.memory import HostMemory

Kept = Tensor | PerHead | None  # indices of the entries that stay: int64 [B, Hkv, n], or by head; None: all


@dataclass(frozen=True)
class EntryShape:
    """What one entry of a layer is: K and V of `head_dim` values in each of `n_kv_heads` heads."""

    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Part(NamedTuple):
    """What some heads of some sequences attend to: k and v [b, h, n, D], entries in the order of their positions.

    sequences, heads: which ones of those that were asked for, and which KV heads. live: int64 [b, h, 1, 1] on the
    device, live entries of each head (None: all n); what comes after them is finite and means nothing.
    """

    k: Tensor
    v: Tensor
    sequences: slice = slice(None)
    heads: slice = slice(None)
    live: Tensor | None = None


def followed(part: Part, k: Tensor, v: Tensor) -> Part:
    """The live entries of a part (all n), copied, and after them those of k and v [B, Hkv, T, D] that belong there."""
    new = k[part.sequences, part.heads], v[part.sequences, part.heads]
    return part._replace(k=torch.cat((part.k, new[0]), dim=2), v=torch.cat((part.v, new[1]), dim=2))


@dataclass(frozen=True)
class LayerMemory:
    """What a pool hands to a layer when it makes it.

    lengths, starts: int64 [S, Hkv], views on the pool's: live entries of each head, and where the first one lies.
    appended: for each slot how many tokens decode steps have added; one list for all layers of a pool.
    before: the layer before this one in the pool (None: it is the first). capacities: of all layers.
    host: where K and V lie on a CPU; one for all layers of a pool.
    """

    capacity: int  # entries of each head, for which there is room
    shape: EntryShape
    lengths: Tensor
    starts: Tensor
    appended: list[int]
    before: KVLayer | None = None
    capacities: Sequence[int] = ()
    host: HostMemory = field(default_factory=HostMemory)


class KVLayer(Protocol):
    """The entries of one layer, for all slots of a pool. Slots are given as a range: neighbours.

    What lies beyond the live entries is always finite, so that a weight of zero hides it.
    """

    per_head: ClassVar[bool]  # takes entries by head (`PerHead`), and heads of different lengths
    kv_dtype: ClassVar[str | None]  # of fewer bits than the model's, which is None
    capacity: int

    def __init__(self, memory: LayerMemory) -> None: ...

    @staticmethod
    def bytes_of(capacity: int, shape: EntryShape) -> int:
        """Bytes that one slot of a layer takes: the only place where this layout's bytes are counted."""

    def span(self, slot: int) -> int:
        """Entries that no head of this slot exceeds, decode steps to come included."""

    def count(self, slot: int) -> int:
        """Live entries of the longest head of a slot, as the host knows them."""

    def entries(self, slot: int) -> int:
        """Live entries of a slot over all heads, as the host knows them."""

    def forgettable(self, slot: int) -> int:
        """How many of the newest entries `truncate` can forget of each head."""

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        """Replace what the slots hold by the `kept` of k and v [B, Hkv, T, D], with `room` for more of each head."""

    def extend(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Add T entries, k and v [B, Hkv, T, D], to each head, and count them."""

    def append(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        """Write T new entries, k and v [B, Hkv, T, D], after the live ones. KVPool.advance counts them, after a step.

        places: int64 [B, Hkv, T], where they belong by `starts` and `lengths`; once a step for all layers.
        """

    def write(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        """As `append`, where no graph is captured: it may go by the host's counts."""

    def read(self, slots: range, new: int = 0) -> list[Part]:
        """The live entries and the `new` ones that were appended and not counted yet, by the host's counts.

        The parts cover every sequence and head once. Views wherever the layout has them.
        """

    def attend(self, slots: range, q: Tensor, window: int | None = None) -> Tensor:
        """Of a layout with a `kv_dtype`: attention of q [B, Hq, T, D], the queries of the last T entries, to all.

        These were appended and are not counted yet; queries are causal, and see `window` entries. -> as q. The other
        layouts leave it to the engine, by `read`.
        """

    def row(self, slot: int) -> tuple[Tensor, ...]:
        """Of a layout with a `kv_dtype`, of one sequence: see QuantisedLayer."""

    def padded(self, slots: range, span: int) -> tuple[Tensor, Tensor]:
        """The first `span` entries of each head, live or not: k and v [B, Hkv, span, D]. Reads no host count."""

    def flat(self) -> tuple[Tensor, Tensor] | None:
        """The memory of all slots as rows [S * R, D] for K and V, addressed by `starts`; None if it is not so."""

    @property
    def rows(self) -> int:
        """R, the rows of one slot there. Not asked of a layer whose memory is not flat."""

    def truncate(self, slots: range, count: int) -> None:
        """Forget the last `count` stored entries of each head."""

    def clear(self, slots: range) -> None:
        """Forget everything stored; the pool sets the count of appended tokens to 0 along with it."""

    def state(self, slot: int) -> dict[str, Tensor]:
        """What a slot holds, as tensors of its own: `restore` takes it back, in any pool of this layout."""

    def restore(self, slot: int, state: dict[str, Tensor], room: int) -> None:
        """Hold what `state` says, with `room` for more of each head."""
