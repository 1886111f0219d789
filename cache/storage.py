"""Slots for keys and values that outlive a request: the next one fills the same memory."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # capacities are rounded up to a multiple of this many slots


class KVStorage:
    """For each of L layers `k[l]` and `v[l]`: [B, Hkv, C_l, D], and the live lengths on the device.

    lengths: int64 [L], entries of each layer. next_position: int64 [B], where the next token of each text stands.
    All of them keep their addresses for as long as the storage lives.
    """

    def __init__(
        self,
        capacities: list[int],
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacities = capacities
        self.batch = batch
        shapes = [(batch, n_kv_heads, capacity, head_dim) for capacity in capacities]
        # Zeros, not empty: attention may multiply an unused slot by a weight of zero, and NaN would survive that.
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.lengths = torch.zeros(len(capacities), dtype=torch.int64, device=device)
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in [*self.k, *self.v])

    def holds(self, capacities: list[int], batch: int) -> bool:
        """Whether a cache of that size finds room here."""
        return batch == self.batch and all(
            wanted <= there for wanted, there in zip(capacities, self.capacities, strict=True)
        )

    def grown(self, capacities: list[int]) -> list[int]:
        """Capacities that suffice for what was here before and for `capacities`."""
        return [max(pair) for pair in zip(capacities, self.capacities, strict=True)]

    def start(self, kept: list[int], ends: list[int], position: int) -> None:
        """Make ready for a text at `position`: no entries yet, and zeros in the slots kept[l] … ends[l] - 1.

        What an earlier text left there could be infinite, and a weight of zero would not hide it.
        """
        self.lengths.zero_()
        self.next_position.fill_(position)
        for layer, (first, end) in enumerate(zip(kept, ends, strict=True)):
            self.k[layer][:, :, first:end].zero_()
            self.v[layer][:, :, first:end].zero_()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put one token's k and v [B, Hkv, 1, D] into the next slot of `layer`, which the device knows."""
        slot = self.lengths[layer : layer + 1]
        self.k[layer].index_copy_(2, slot, k)
        self.v[layer].index_copy_(2, slot, v)

    def advance(self) -> None:
        """End a decode step: every layer has one entry more."""
        self.lengths += 1
        self.next_position += 1


def round_up(slots: int) -> int:
    """To the next multiple of BLOCK."""
    return -(-slots // BLOCK) * BLOCK


def bucket(slots: int) -> int:
    """To the next of a few lengths, eight to an octave from 256 on: at most an eighth is added."""
    step = max(BLOCK, 1 << max(0, (slots - 1).bit_length() - 4))
    return -(-slots // step) * step
