"""ClusterKV: each step recalls the clusters of keys that its query points to (arXiv 2412.03213)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.read_few import ReadByBudget
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.setting import redefined, setting, whole
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    import torch

    from fastkv.cache.reader import Index, IndexSizes


@dataclass(frozen=True, kw_only=True)
class ClusterKV(ReadByBudget):
    """The keys of each KV head are clustered after the prefill, by distance (k-means); a step reads whole clusters.

    per_cluster: tokens of the prompt to a cluster, in the mean. sinks: the first entries, which are in no cluster, and
    always read. read_retention, read_len: what a step reads, exactly: the sinks, the newest entries, which wait to be
    clustered (320 at most, and no more than half of the rest), and the best clusters, of the last one only a part. The
    others are those of ReadByBudget and ReadFew.

    What differs from the paper: clusters are chosen for each KV head, by the shares of attention that its query heads
    would give their means, summed; the newest entries are part of the budget; keys are clustered by distance, not by
    the cosine, among 1,024 to 2,047 neighbours; and clusters are smaller (its are of about 80 tokens, with which a
    small model lost nearly all answers). Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "clusterkv"

    sinks: int = redefined(WindowScored, "sinks", 16)
    per_cluster: int = setting(16, whole(1), "tokens of the prompt to a cluster, in the mean", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_len is not None and self.read_len < self._least:
            raise FastKVError(
                f"read_len must be at least {self._least}, the sinks and two more entries, not {self.read_len}",
                setting="read_len",
            )

    @property
    def _least(self) -> int:
        return self.sinks + 2

    def read_budget(self, n_tokens: int) -> int:
        return max(super().read_budget(n_tokens), min(self._least, n_tokens))

    def index(self, layer: int, sizes: IndexSizes, device: torch.device) -> Index:
        from fastkv.cache.clusters import Clusters

        return Clusters(sizes, device, self.sinks, self.per_cluster)

    def index_bytes(self, layer: int, sizes: IndexSizes) -> tuple[int, int]:
        from fastkv.cache.clusters import Clusters

        held = Clusters.bytes_of(sizes, self.sinks, self.per_cluster)
        return held, Clusters.scratch_of(sizes, self.per_cluster)
