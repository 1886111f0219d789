"""The KV cache of one request: every layer's slots, preallocated for the kept entries and the tokens to come.

A slot is a place in a buffer; a position is a token's place in the text. Keys are stored rotated by their position,
so the order of the slots means nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fastkv.cache.storage import KVStorage, bucket, round_up
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from fastkv.cache.ragged import RaggedEntries


class KVCache:
    """Keys and values of L layers, `k[l]` and `v[l]`: [B, Hkv, C_l, D] with C_l slots, zeros where unused.

    Filled by `load` (once a layer, at the prefill), then by `append` (each layer) and `advance` (once) a decode step.
    `kept[l]` is the number of entries that layer l loaded and `appended` the steps since: the live length on the host.
    `lengths` int64 [L, B, Hkv] and `next_position` int64 [B] say the same on the device.

    The slots are its own, or the first ones of a `storage` that holds at least `capacities(kept, max_tokens)`. What is
    loaded may be less than the `kept` that it was made for. Heads of different lengths are a RaggedKVCache's.
    """

    ragged: ClassVar[bool] = False

    def __init__(
        self,
        kept: list[int],
        max_tokens: int,
        *,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        position: int,
        position_limit: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: KVStorage | None = None,
    ) -> None:
        self.kept = list(kept)
        self.n_kv_heads, self.head_dim = n_kv_heads, head_dim
        self.appended = 0
        self.max_tokens = max_tokens
        self.prompt_tokens = position
        self.position_limit = position_limit  # positions from here on are beyond what the model can tell apart
        slots = self.capacities(kept, max_tokens)
        if storage is None:
            storage = KVStorage.allocate(slots, batch, n_kv_heads, head_dim, dtype=dtype, device=device)
        self.storage = storage
        storage.start(kept, [bucket(count) for count in slots], position)
        self.k = [buffer[:, :, :count] for buffer, count in zip(storage.k, slots, strict=True)]
        self.v = [buffer[:, :, :count] for buffer, count in zip(storage.v, slots, strict=True)]

    @property
    def lengths(self) -> Tensor:
        return self.storage.lengths

    @property
    def next_position(self) -> Tensor:
        return self.storage.next_position

    @property
    def batch(self) -> int:
        return self.next_position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its slots for keys and values."""
        return sum(buffer.nbytes for buffer in [*self.k, *self.v])

    @staticmethod
    def capacities(kept: list[int], max_tokens: int) -> list[int]:
        """Slots of each layer: for the entries kept and the tokens to come, rounded up."""
        return [round_up(entries + max_tokens) for entries in kept]

    @staticmethod
    def size_of(kept: list[int], max_tokens: int, n_kv_heads: int, head_dim: int) -> int:
        """Values that a cache for one prompt holds room for, K and V over all layers."""
        return sum(2 * n_kv_heads * slots * head_dim for slots in KVCache.capacities(kept, max_tokens))

    @property
    def spans(self) -> list[int]:
        """For each layer a number of slots that no head exceeds, the same for every text of this size."""
        return [buffer.shape[2] for buffer in self.k]

    @property
    def entries(self) -> int:
        """Entries of the prompt that were kept of each text, over all layers and heads."""
        return self.n_kv_heads * sum(self.kept)

    def length(self, layer: int) -> int:
        """Entries that `layer` holds for each KV head."""
        return self.kept[layer] + self.appended

    def load(self, layer: int, k: Tensor, v: Tensor, entries: Tensor | RaggedEntries | None) -> None:
        """Store what the prefill keeps of k and v [B, Hkv, T, D]: the `entries` int64 [B, Hkv, n], or all (None)."""
        assert entries is None or isinstance(entries, Tensor), "ragged entries belong into a RaggedKVCache"
        count = (k if entries is None else entries).shape[2]
        spare = slice(count, self.kept[layer])  # planned for entries, so it was not cleared
        self.k[layer][:, :, spare].zero_()
        self.v[layer][:, :, spare].zero_()
        self.kept[layer] = count
        if entries is None:
            self.k[layer][:, :, :count] = k
            self.v[layer][:, :, :count] = v
        else:
            index = entries.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
            self.k[layer][:, :, :count] = k.gather(2, index)
            self.v[layer][:, :, :count] = v.gather(2, index)
        self.lengths[layer] = count

    def check_room(self) -> None:
        """Raise FastKVError unless one more token fits into the buffers and into the model's context."""
        if self.appended >= self.max_tokens:
            raise FastKVError(
                f"the cache is full: it has room for max_tokens={self.max_tokens} tokens behind the prompt"
            )
        if self.prompt_tokens + self.appended >= self.position_limit:
            raise FastKVError(f"the text has reached the limit of {self.position_limit} tokens")

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's k and v [B, Hkv, 1, D] into the next slot of `layer`.

        Returns views on all of the layer's live entries, the new one included: [B, Hkv, n, D] each.
        """
        slot = self.length(layer)
        self.k[layer][:, :, slot : slot + 1] = k
        self.v[layer][:, :, slot : slot + 1] = v
        return self.k[layer][:, :, : slot + 1], self.v[layer][:, :, : slot + 1]

    def advance(self) -> None:
        """End a decode step: every layer has appended its token."""
        self.appended += 1
        self.storage.lengths.add_(1)
        self.storage.next_position.add_(1)
