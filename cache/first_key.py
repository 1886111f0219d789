"""Which heads of a step look away from everything but the first token, as an index (arXiv 2604.16883)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.reader import IndexSizes

_FLOAT = 4  # bytes


class FirstKey:
    """The direction of the first entry's key: float32 [B, Hkv, D, 1]. See Index.

    A KV head reads nothing in a step where the cosine between that key and each query of its group is above `tau`.
    """

    def __init__(self, sizes: IndexSizes, device: torch.device, tau: float) -> None:
        self._tau, self._known = tau, False
        self.direction = torch.zeros(sizes.batch, sizes.n_kv_heads, sizes.head_dim, 1, device=device)

    @staticmethod
    def bytes_of(sizes: IndexSizes) -> int:
        """Bytes of the direction."""
        return sizes.batch * sizes.n_kv_heads * sizes.head_dim * _FLOAT

    @property
    def nbytes(self) -> int:
        return self.direction.nbytes

    def due(self, n_entries: int) -> bool:
        return not self._known

    def learn(self, k: Tensor) -> None:
        self.direction.copy_(F.normalize(k[:, :, 0].float(), dim=2).unsqueeze(3))
        self._known = True

    def forget(self, n_entries: int) -> None:
        self._known = self._known and n_entries > 0

    def choose(self, q: Tensor, n_entries: int, budget: int) -> Tensor | None:
        cosines = (F.normalize(q.float(), dim=3) @ self.direction).squeeze(3)  # [B, Hkv, G]
        reads = (cosines <= self._tau).any(dim=2)
        return None if bool(reads.all()) else reads

    @property
    def read_bytes(self) -> int:
        return self.nbytes
