"""Clusters: an index of keys that are alike (arXiv 2412.03213), each of which a step reads whole or not.

The keys of a prompt are clustered once, by distance (a mean stands for its keys as well as they are near), those of a
stretch of it among themselves: so the work grows as the prompt does. Those that steps append wait, and are clustered a
block at a time. A step ranks the clusters by the products of the queries with their mean keys, and reads them from the
best on until its budget is used up. The first entries and those that wait are read in any case.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastkv.cache.reader import IndexSizes, wanted
from fastkv.kernels.key_products import products

ROUNDS = 20  # of k-means at most
SETTLED = 0.01  # share of the keys that may still move at the end
PER_CLUSTER = 16  # tokens of a prompt
STRETCH = 1024  # tokens that are clustered together, at least; less than twice as many
BLOCK = 320  # tokens of an answer that are clustered together, at most
BLOCK_PER_CLUSTER = 40  # of them
_VALUES = 2**20  # products of keys and centroids that are held at a time
_INDEX, _FLOAT = 8, 4  # bytes


class Clusters:
    """Of all entries but the first `sinks` and the newest ones. See Index.

    means: float32 [B, Hkv, C, D], of the keys as they are. order: int32 [B, Hkv, N], the entries, one cluster after
    another. starts, counts: int64 [B, Hkv, C], which of them are a cluster's.
    """

    def __init__(
        self, sizes: IndexSizes, device: torch.device, sinks: int, per_cluster: int = PER_CLUSTER, block: int = BLOCK
    ) -> None:
        self._sinks, self._per_cluster = sinks, per_cluster
        self._block = block_of(sizes, sinks, block)
        self._heads, self._head_dim = (sizes.batch, sizes.n_kv_heads), sizes.head_dim
        self._ends: list[tuple[int, int]] = []  # of what was clustered together: the entry and the cluster after it
        n_clusters = most_clusters(sizes, sinks, per_cluster, self._block)
        self.means = torch.zeros(*self._heads, n_clusters, sizes.head_dim, device=device)
        self.order = torch.zeros(*self._heads, max(0, sizes.capacity - sinks), dtype=torch.int32, device=device)
        self.starts, self.counts = (
            torch.zeros(*self._heads, n_clusters, dtype=torch.int64, device=device) for _ in range(2)
        )

    @staticmethod
    def bytes_of(sizes: IndexSizes, sinks: int, per_cluster: int = PER_CLUSTER, block: int = BLOCK) -> int:
        """Bytes of its tensors."""
        n_clusters = most_clusters(sizes, sinks, per_cluster, block_of(sizes, sinks, block))
        each = n_clusters * (sizes.head_dim * _FLOAT + 2 * _INDEX) + max(0, sizes.capacity - sinks) * 4
        return sizes.batch * sizes.n_kv_heads * each

    @staticmethod
    def scratch_of(sizes: IndexSizes, per_cluster: int = PER_CLUSTER) -> int:
        """Bytes that `learn` holds meanwhile, of a stretch: keys in float32 twice, their clusters, products."""
        n_keys = min(sizes.n_entries, 2 * max(STRETCH, per_cluster) - 1)
        count = n_keys // per_cluster + 1
        heads = sizes.batch * sizes.n_kv_heads
        held = heads * n_keys * (2 * sizes.head_dim * _FLOAT + 3 * _INDEX)
        products = max(heads * count, min(_VALUES, heads * n_keys * count))
        return held + _FLOAT * (products + 3 * heads * count * sizes.head_dim)

    @property
    def _known(self) -> int:
        """Entries before this one are clustered, the sinks apart."""
        return self._ends[-1][0] if self._ends else 0

    @property
    def _n_clusters(self) -> int:
        return self._ends[-1][1] if self._ends else 0

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.means, self.order, self.starts, self.counts))

    def due(self, n_entries: int) -> bool:
        waiting = n_entries - max(self._known, self._sinks)
        return waiting > (self._block if self._known else 1)

    def learn(self, k: Tensor) -> None:
        per_cluster = min(BLOCK_PER_CLUSTER, self._per_cluster) if self._known else self._per_cluster
        first, end = max(self._known, self._sinks), k.shape[2] - 1  # the newest is always read
        stretches = max(1, (end - first) // max(STRETCH, per_cluster))
        places = [first + (end - first) * place // stretches for place in range(stretches + 1)]
        for start, stop in pairwise(places):
            self._cluster(k[:, :, start:stop], start, per_cluster)

    def _cluster(self, k: Tensor, first: int, per_cluster: int) -> None:
        """Cluster some keys, [B, Hkv, n, D], whose first entry is `first`."""
        end = first + k.shape[2]
        count = max(1, k.shape[2] // per_cluster)
        keys = k.flatten(0, 1).float()
        of_key = k_means(keys, count)  # [B * Hkv, n]
        order = of_key.argsort(dim=1, stable=True)
        counts = _counts(of_key, count)
        new, old = slice(self._n_clusters, self._n_clusters + count), first - self._sinks
        means = _sums(keys, of_key, count) / counts.clamp_min(1).unsqueeze(2)
        self.means[:, :, new] = means.unflatten(0, self._heads)
        self.order[:, :, old : old + end - first] = (order + first).unflatten(0, self._heads)
        self.starts[:, :, new] = (counts.cumsum(1) - counts + old).unflatten(0, self._heads)
        self.counts[:, :, new] = counts.unflatten(0, self._heads)
        self._ends.append((end, self._n_clusters + count))

    def forget(self, n_entries: int) -> None:
        while n_entries < self._known:  # a cluster of these may have some of what is gone
            self._ends.pop()

    def choose(self, q: Tensor, n_entries: int, budget: int) -> Tensor | None:
        sinks = min(self._sinks, n_entries)
        first = max(self._known, sinks)  # of those that wait
        room = budget - sinks - (n_entries - first)
        if n_entries <= budget or room >= first - sinks:
            return None
        parts = [_range(0, sinks, q), _range(first, n_entries, q)]
        if room > 0:
            parts.insert(1, self._best(q, room))
        return torch.cat(parts, dim=2)

    def _best(self, q: Tensor, room: int) -> Tensor:
        """So many entries of the best clusters, of the last one only its first: int64 [B, Hkv, room]."""
        n = self._n_clusters
        counts, logits = self.counts[..., :n], products(q.float(), self.means[:, :, :n])
        logits.masked_fill_((counts == 0).unsqueeze(2), -torch.inf)  # which would take shares, and give nothing
        ranked = wanted(logits, q.shape[3]).argsort(dim=-1, descending=True)  # [B, Hkv, C]
        counts = counts.gather(2, ranked)
        ends = counts.cumsum(2)
        shifts = self.starts[..., :n].gather(2, ranked) - (ends - counts)
        places = torch.arange(room, device=q.device).expand(*ranked.shape[:2], -1).contiguous()
        of_place = torch.searchsorted(ends, places, right=True)
        return self.order.gather(2, shifts.gather(2, of_place) + places).long()

    @property
    def read_bytes(self) -> int:
        heads, n = self._heads[0] * self._heads[1], self._n_clusters
        return heads * n * (self._head_dim * _FLOAT + 2 * _INDEX)


def block_of(sizes: IndexSizes, sinks: int, block: int) -> int:
    """Entries that wait at most: no more than leave room for as many of clusters."""
    return max(1, min(block, (sizes.budget - sinks) // 2))


def most_clusters(sizes: IndexSizes, sinks: int, per_cluster: int, block: int) -> int:
    """Clusters of the prompt, and of what may be appended: what is clustered together has one more at most."""
    tokens = max(0, sizes.capacity - sinks)
    together = 1 + tokens // max(STRETCH, per_cluster) + max(0, sizes.capacity - sizes.n_entries) // block
    return tokens // min(BLOCK_PER_CLUSTER, per_cluster) + 1 + together


def k_means(keys: Tensor, count: int) -> Tensor:
    """Clusters by distance: float32 keys [H, n, D] -> int64 [H, n], in which of `count` clusters each key is.

    Evenly spaced keys are the first centroids, so that equal keys give equal clusters. A centroid is the mean of its
    keys; one that has lost all keys stays where it was. A head is done when hardly a key moves, whatever the others do,
    or after ROUNDS.
    """
    keys = keys - keys.mean(dim=1, keepdim=True)  # distances stay, and are rounded less
    first = torch.arange(count, device=keys.device) * keys.shape[1] // count
    centroids = keys[:, first]
    of_key = _nearest(keys, centroids)
    moving = torch.ones(len(keys), 1, dtype=torch.bool, device=keys.device)
    for _ in range(ROUNDS - 1):
        counts = _counts(of_key, count).unsqueeze(2)
        centroids = torch.where(counts > 0, _sums(keys, of_key, count) / counts.clamp_min(1), centroids)
        nearest = _nearest(keys, centroids).where(moving, of_key)
        moving = (nearest != of_key).sum(dim=1, keepdim=True) > SETTLED * keys.shape[1]
        of_key = nearest
        if not bool(moving.any()):
            break
    return of_key


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """The centroid that is nearest to each key: [H, n, D] and [H, C, D] -> int64 [H, n]; some keys at a time."""
    n_heads, n_keys, _ = keys.shape
    nearest = torch.empty(n_heads, n_keys, dtype=torch.int64, device=keys.device)
    some = max(1, _VALUES // (n_heads * centroids.shape[1]))
    half = centroids.square().sum(dim=2).unsqueeze(1) / 2
    for start in range(0, n_keys, some):
        part = slice(start, start + some)
        nearest[:, part] = torch.baddbmm(half, keys[:, part], centroids.transpose(1, 2), beta=-1).max(dim=2).indices
    return nearest


def _counts(of_key: Tensor, count: int) -> Tensor:
    """Keys of each cluster: int64 [H, n] -> [H, count]."""
    counts = torch.zeros(len(of_key), count, dtype=torch.int64, device=of_key.device)
    return counts.scatter_add_(1, of_key, torch.ones_like(of_key))


def _sums(keys: Tensor, of_key: Tensor, count: int) -> Tensor:
    """The sums of the keys of each cluster: [H, n, D] and int64 [H, n] -> [H, count, D]."""
    n_heads, _, head_dim = keys.shape
    first = torch.arange(n_heads, device=keys.device).unsqueeze(1) * count
    sums = torch.zeros(n_heads * count, head_dim, device=keys.device)
    return sums.index_add_(0, (of_key + first).flatten(), keys.flatten(0, 1)).view(n_heads, count, head_dim)


def _range(first: int, end: int, q: Tensor) -> Tensor:
    """The entries first … end - 1 of each head: int64 [B, Hkv, n]."""
    return torch.arange(first, end, device=q.device).expand(*q.shape[:2], -1)
