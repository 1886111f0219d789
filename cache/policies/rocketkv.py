"""RocketKV: a coarse selection after the prefill, then a fine one in each step (arXiv 2502.14051)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.read_few import ReadByBudget
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.setting import number, redefined, setting

if TYPE_CHECKING:
    import torch

    from fastkv.cache.reader import Index, IndexSizes


@dataclass(frozen=True, kw_only=True)
class RocketKV(ReadByBudget):
    """With c = tokens / what a step may read, a layer keeps tokens / c^a by SnapKV's scores, a = 0.2 + 0.06 log2 c.

    Of what it keeps, c2 times what a step may read, a step looks up pages of about sqrt(c2) entries, in those channels
    alone where the query is largest, and reads the best pages: half of what it reads are channels of pages, half are
    entries. So what it reads is less in bytes than the entries that read_retention or read_len says.

    kv_retention: 1 (default) keeps tokens / c^a; below 1, or with kv_len or keep_mass, this wins. window, kernel: of
    the scores. dense_layers: 0, unlike the others of its kind. Other settings are those of ReadByBudget and ReadFew.

    What differs from the paper: its window is 32; the newest page is always read. The estimate is not divided by the
    root of the share that the channels have of the query: the order of the pages stays the same. Raises FastKVError for
    a value out of range.
    """

    name: ClassVar[str] = "rocketkv"

    kv_retention: float = setting(
        1.0, number(0, 1, above=True), "share of the prompt whose KV each layer keeps; 1: tokens / c^a", metavar="R"
    )
    kernel: int = redefined(WindowScored, "kernel", 63)
    dense_layers: int = redefined(ReadByBudget, "dense_layers", 0)

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        if self._says_otherwise or layer < self.dense_layers:
            return super().budget(layer, n_layers, n_tokens)
        return self.count(None, kept_share(n_tokens / self.read_budget(n_tokens)), n_tokens)

    @property
    def _says_otherwise(self) -> bool:
        """Whether a setting says how much is kept, in place of c^-a."""
        return self.kv_len is not None or self.kv_retention < 1 or self.keep_mass is not None

    def least_budget(self, n_tokens: int) -> int:
        return min(super().least_budget(n_tokens), self.budget(self.dense_layers, 0, n_tokens))

    def index(self, layer: int, sizes: IndexSizes, device: torch.device) -> Index:
        from fastkv.cache.pages import Pages

        page, channels = pages_of(sizes)
        return Pages(sizes, device, page, channels, share=0.5)

    def index_bytes(self, layer: int, sizes: IndexSizes) -> tuple[int, int]:
        from fastkv.cache.pages import Pages

        page, _ = pages_of(sizes)
        return Pages.bytes_of(sizes, page), Pages.scratch_of(sizes, page)


def kept_share(c: float) -> float:
    """What is kept of a prompt that has c times the tokens that a step may read: c^-a."""
    return c ** -min(0.2 + 0.06 * math.log2(c), 0.8)


def pages_of(sizes: IndexSizes) -> tuple[int, int]:
    """Entries of a page, and channels that are looked up, where a head has c2 times what a step may read."""
    c2 = max(1.0, sizes.n_entries / sizes.budget)
    page = min(math.floor(c2), math.ceil(math.sqrt(c2)))
    return page, max(1, min(sizes.head_dim, round(sizes.head_dim * page / c2)))
