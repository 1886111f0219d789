"""Slots for keys and values that outlive a request: the next one fills the same memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # capacities are rounded up to a multiple of this many slots


@dataclass(frozen=True)
class KVStorage:
    """For each of L layers `k[l]` and `v[l]`: [B, Hkv, C_l, D], and for each of B texts what is live, on the device.

    lengths: int64 [L, B, Hkv], entries of each KV head. starts: int64 [L, B, Hkv], the slot where they begin, of the
    Hkv * C_l slots that a layer has for a text: h * C_l for head h, unless heads differ in length and lie one behind
    the other. next_position: int64 [B], where the next token of each text stands.
    All of them keep their addresses for as long as the storage lives.

    whole, first: what these are rows of, and from which one on (`rows`); None for a storage of its own.
    """

    k: list[Tensor]
    v: list[Tensor]
    lengths: Tensor
    starts: Tensor
    next_position: Tensor
    whole: KVStorage | None = None
    first: int = 0

    @classmethod
    def allocate(
        cls,
        capacities: list[int],
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVStorage:
        """New slots, `capacities[l]` in layer l for each text and KV head."""
        shapes = [(batch, n_kv_heads, capacity, head_dim) for capacity in capacities]
        per_head = (len(capacities), batch, n_kv_heads)
        # Zeros, not empty: attention may multiply an unused slot by a weight of zero, and NaN would survive that.
        made = cls(
            [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes],
            [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes],
            torch.zeros(per_head, dtype=torch.int64, device=device),
            torch.zeros(per_head, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )
        made._start_alike()
        return made

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer with the slots of all heads in a row: [B, Hkv * C, D] each, the same memory."""
        shape = (self.batch, -1, self.k[layer].shape[3])
        return self.k[layer].view(shape), self.v[layer].view(shape)

    @property
    def batch(self) -> int:
        return self.next_position.shape[0]

    @property
    def capacities(self) -> list[int]:
        return [buffer.shape[2] for buffer in self.k]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in [*self.k, *self.v])

    def rows(self, first: int, end: int) -> KVStorage:
        """The same slots, of the texts first … end - 1 alone."""
        return KVStorage(
            [buffer[first:end] for buffer in self.k],
            [buffer[first:end] for buffer in self.v],
            self.lengths[:, first:end],
            self.starts[:, first:end],
            self.next_position[first:end],
            self if self.whole is None else self.whole,
            self.first + first,
        )

    def is_followed_by(self, other: KVStorage) -> bool:
        """Whether the two are rows of one storage, side by side."""
        return self.whole is not None and self.whole is other.whole and self.first + self.batch == other.first

    def holds(self, capacities: list[int], batch: int) -> bool:
        """Whether caches of that size find room here."""
        return batch <= self.batch and all(
            wanted <= there for wanted, there in zip(capacities, self.capacities, strict=True)
        )

    def start(self, kept: list[int], ends: list[int], position: int) -> None:
        """Make ready for texts at `position`: no entries yet, and zeros in the slots kept[l] … ends[l] - 1 of a head.

        What an earlier text left there could be infinite, and a weight of zero would not hide it.
        """
        self.lengths.zero_()
        self.next_position.fill_(position)
        self._start_alike()
        for layer, (first, end) in enumerate(zip(kept, ends, strict=True)):
            self.k[layer][:, :, first:end].zero_()
            self.v[layer][:, :, first:end].zero_()

    def _start_alike(self) -> None:
        """Let each head begin where heads of one length do."""
        starts = [[head * capacity for head in range(self.starts.shape[2])] for capacity in self.capacities]
        self.starts.copy_(torch.tensor(starts).unsqueeze(1))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put one token's k and v [B, Hkv, 1, D] into each head's next slot of `layer`, which the device knows."""
        flat_k, flat_v = self.flat(layer)
        slots = (self.starts[layer] + self.lengths[layer]).unsqueeze(2).expand(-1, -1, k.shape[-1])  # [B, Hkv, D]
        flat_k.scatter_(1, slots, k.squeeze(2))
        flat_v.scatter_(1, slots, v.squeeze(2))


def round_up(slots: int) -> int:
    """To the next multiple of BLOCK."""
    return -(-slots // BLOCK) * BLOCK


def bucket(slots: int) -> int:
    """To the next of a few lengths, eight to an octave from 256 on: at most an eighth is added."""
    step = max(BLOCK, 1 << max(0, (slots - 1).bit_length() - 4))
    return -(-slots // step) * step
