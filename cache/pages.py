"""Pages: an index that knows of each run of keys how far they reach in every channel (arXiv 2406.10774, 2502.14051).

What a query's product with any key of a page is at most, the extremes say alone: for each channel the larger of the
query times its least and its greatest value. A step looks these bounds up, of some channels or of all, and reads the
pages that the queries of a group want most. The newest page is always read, so only those before it are known here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkv.cache.reader import IndexSizes, wanted
from fastkv.kernels.key_products import products


class Pages:
    """Pages of `page` entries each. See Index.

    channels: how many are looked up, those with the largest sum of |q| over a group (None: all). share: of a step's
    budget that goes to entries.

    extremes: [B, Hkv, 2 D, P] in the dtype of the keys: of each channel the greatest value, then the least ones. Where
    a page is one entry both are the key, and [B, Hkv, D, P] has it once.
    """

    def __init__(
        self, sizes: IndexSizes, device: torch.device, page: int, channels: int | None = None, share: float = 1.0
    ) -> None:
        self._page, self._share = page, share
        # Of a page with two extremes the sign of the query says which one is looked up, in all channels, too.
        every = channels is None or (page == 1 and channels >= sizes.head_dim)
        self._channels = None if every else channels
        self._known, self._key_bytes = 0, sizes.key_bytes
        self.extremes = torch.zeros(self.shape(sizes, page), dtype=sizes.dtype, device=device)

    @staticmethod
    def shape(sizes: IndexSizes, page: int) -> tuple[int, int, int, int]:
        """Of the extremes."""
        return sizes.batch, sizes.n_kv_heads, (1 if page == 1 else 2) * sizes.head_dim, -(-sizes.capacity // page)

    @classmethod
    def bytes_of(cls, sizes: IndexSizes, page: int) -> int:
        """Bytes of the extremes."""
        return math.prod(cls.shape(sizes, page)) * sizes.dtype.itemsize

    @classmethod
    def scratch_of(cls, sizes: IndexSizes, page: int) -> int:
        """Bytes that `learn` holds meanwhile: the extremes once more."""
        return cls.bytes_of(sizes, page)

    @property
    def nbytes(self) -> int:
        return self.extremes.nbytes

    def due(self, n_entries: int) -> bool:
        return (n_entries - 1) // self._page > self._known

    def learn(self, k: Tensor) -> None:
        known, pages = self._known, (k.shape[2] - 1) // self._page
        new = k[:, :, known * self._page : pages * self._page]
        head_dim = k.shape[3]
        if self._page == 1:
            self.extremes[..., known:pages] = new.transpose(2, 3)
        else:
            least, greatest = torch.aminmax(new.unflatten(2, (-1, self._page)), dim=3)  # [B, Hkv, pages, D]
            self.extremes[:, :, :head_dim, known:pages] = greatest.transpose(2, 3)
            self.extremes[:, :, head_dim:, known:pages] = least.transpose(2, 3)
        self._known = pages

    def forget(self, n_entries: int) -> None:
        self._known = min(self._known, max(0, n_entries - 1) // self._page)

    def choose(self, q: Tensor, n_entries: int, budget: int) -> Tensor | None:
        before = (n_entries - 1) // self._page  # pages before the newest one
        count = max(1, int(budget * self._share) // self._page) - 1
        if n_entries <= budget or count >= before:
            return None
        newest = torch.arange(before * self._page, n_entries, device=q.device).expand(*q.shape[:2], -1)
        if not count:
            return newest
        best = wanted(self.bounds(q)[..., :before], q.shape[3]).topk(count, dim=-1).indices.unsqueeze(-1) * self._page
        chosen = best + torch.arange(self._page, device=q.device)
        return torch.cat((chosen.flatten(2), newest), dim=2)

    def bounds(self, q: Tensor) -> Tensor:
        """What a query's product with any key of a page is at most: float32 [B, Hkv, G, P], of q [B, Hkv, G, D].

        Where only some channels are looked up, which ones is decided, and by whose sign, for a group together: then it
        is [B, Hkv, 1, P], of the sum of its queries.
        """
        return self._of_some(q) if self._channels is not None else self._of_all(q)

    def _of_all(self, q: Tensor) -> Tensor:
        """By all channels."""
        rows = q if self._page == 1 else torch.cat((q.clamp_min(0), q.clamp_max(0)), dim=3)
        return products(rows, self.extremes[..., : self._known].transpose(2, 3))

    def _of_some(self, q: Tensor) -> Tensor:
        """By the channels with the largest |q|, of the summed query."""
        summed = q.sum(dim=2)  # [B, Hkv, D]
        channels = q.abs().sum(dim=2).topk(self._channels or 0, dim=-1).indices
        values = summed.gather(2, channels)
        rows = channels if self._page == 1 else channels + (values < 0) * summed.shape[2]
        n_rows, capacity = self.extremes.shape[2:]
        first = torch.arange(0, rows.shape[0] * rows.shape[1] * n_rows, n_rows, device=q.device)
        flat = self.extremes.view(-1, capacity)[:, : self._known]
        looked_up = flat.index_select(0, (rows.flatten(0, 1) + first.unsqueeze(1)).flatten())
        return products(values.unsqueeze(2), looked_up.view(*rows.shape, self._known).transpose(2, 3))

    @property
    def read_bytes(self) -> int:
        channels = self.extremes.shape[2] if self._channels is None else self._channels
        head_dim = self.extremes.shape[2] // (1 if self._page == 1 else 2)
        return self._known * channels * self._key_bytes // head_dim
