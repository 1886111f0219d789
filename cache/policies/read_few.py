"""What policies share whose steps read few of the entries that they keep (cache/reader.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from fastkv.cache.policies.optional_tsp import OptionalTSP
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.policy import Policy
from fastkv.cache.setting import number, redefined, setting, whole
from fastkv.errors import FastKVError

_ALL = 2**62  # tokens: more than any prompt has
DENSE_LAYERS_HELP = "first layers, whose steps read everything"


@dataclass(frozen=True, kw_only=True)
class ReadFew(WindowScored, OptionalTSP):
    """Keeps all entries unless told otherwise, and reads few in a step: the memory of a full cache, and its answers.

    kv_retention, kv_len, and how entries are scored where these or TSP drop any: WindowScored's, as in SnapKV.
    tsp_rate, tsp_layer: OptionalTSP's. dense_layers: the first layers, which read everything.

    A layer with a sliding window reads that window.
    """

    compresses_again: ClassVar[bool] = True

    kv_retention: float = redefined(WindowScored, "kv_retention", 1.0)
    dense_layers: int = setting(2, whole(0), DENSE_LAYERS_HELP, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_head:
            raise FastKVError(
                f"a step of {self.name} reads heads of equal length: leave keep_mass_by at layer",
                setting="keep_mass_by",
            )

    def least_budget(self, n_tokens: int) -> int:
        return min(super().least_budget(n_tokens), self.count(None, self.tsp_rate, n_tokens))

    def reads_few(self, layer: int, n_entries: int, n_tokens: int) -> bool:
        return layer >= self.dense_layers

    def keeping_all(self) -> Policy:
        return dataclasses.replace(
            self, kv_retention=1.0, kv_len=_ALL, tsp_rate=1.0, keep_mass=None, keep_mass_by="layer", keep_mass_most=1.0
        )


@dataclass(frozen=True, kw_only=True)
class ReadByBudget(ReadFew):
    """A step has a budget of entries for each KV head.

    read_retention: as a share of the tokens so far, those of the answer, too; min_tokens is its floor. read_len: as an
    absolute number; it wins over the share, and no floor applies to it.
    """

    read_retention: float = setting(
        0.1, number(0, 1, above=True), "share of the tokens so far whose entries a step reads", metavar="R"
    )
    read_len: int | None = setting(None, whole(1), "entries that a step reads, in place of it", metavar="N")

    def read_budget(self, n_tokens: int) -> int:
        share = max(int(self.read_retention * n_tokens), self.min_tokens)
        return min(share if self.read_len is None else self.read_len, n_tokens)

    def reads_few(self, layer: int, n_entries: int, n_tokens: int) -> bool:
        return super().reads_few(layer, n_entries, n_tokens) and n_entries > self.read_budget(n_tokens)
