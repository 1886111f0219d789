"""Quest: each step reads the pages of entries whose extreme keys promise most (arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.read_few import ReadByBudget
from fastkv.cache.setting import setting, whole

if TYPE_CHECKING:
    import torch

    from fastkv.cache.reader import Index, IndexSizes

LEAST_PAGES = 3


@dataclass(frozen=True, kw_only=True)
class Quest(ReadByBudget):
    """Of each page the least and the greatest value of every channel of its keys bound any query's product with them.

    page: entries of a page. read_retention, read_len: what a step reads, in whole pages, the newest one among them;
    three pages at least. A step also reads the extremes of all pages: 1/8 of the keys at 16 entries a page. The others
    are those of ReadByBudget and ReadFew.

    What differs from the paper: pages are chosen for each KV head, by the shares of attention that its query heads
    would give to keys as good as the bounds, summed. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "quest"

    page: int = setting(16, whole(1), "entries of a page", metavar="N")

    def read_budget(self, n_tokens: int) -> int:
        return max(super().read_budget(n_tokens), min(LEAST_PAGES * self.page, n_tokens))

    def index(self, layer: int, sizes: IndexSizes, device: torch.device) -> Index:
        from fastkv.cache.pages import Pages

        return Pages(sizes, device, self.page)

    def index_bytes(self, layer: int, sizes: IndexSizes) -> tuple[int, int]:
        from fastkv.cache.pages import Pages

        return Pages.bytes_of(sizes, self.page), Pages.scratch_of(sizes, self.page)
