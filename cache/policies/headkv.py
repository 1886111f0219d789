"""HeadKV: heads that retrieve keep more, by a table that was measured before (arXiv 2410.19258)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fastkv.cache.head_table import Budgets, Table, read_table, share_out
from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.setting import Values, no_setting, number, setting
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor


def _read(name: str, source: Any) -> Table:
    """The table itself: what is compared and told of is what a file said, wherever it was."""
    return read_table(source)


@dataclass(frozen=True, kw_only=True)
class HeadKV(SnapKV):
    """SnapKV's scores, under a budget of its own for each KV head of the model.

    head_scores: the importance of each head, at least 0: a JSON file of `fastkv-eval head-scores`, or the table itself,
    a sequence for each layer with a number for each KV head; the setting then is the table. kv_retention, kv_len,
    min_tokens: the MEAN budget b of a head. beta: at least 1; of a budget without its window each head keeps
    (1 - 1 / beta), the rest is pooled over the model and shared in proportion to importance. The others are SnapKV's.

    What differs from the paper: the command's table is one of retrieval heads, without the paper's scores of reasoning;
    what differs in SnapKV, so that budgets belong to KV heads and not to query heads; what a head cannot use, because
    the prompt is shorter, goes to the others; and rounding, which makes the total exact and that of a layer a multiple
    of its heads. Raises FastKVError for a table that cannot be read or is of another model, and for a value out of
    range.
    """

    name: ClassVar[str] = "headkv"
    per_head = True
    compresses_again: ClassVar[bool] = False  # the earlier entries of its heads differ in number

    head_scores: str | PathLike[str] | Table | None = setting(  # noqa: RUF009
        None, Values(str, _read), "JSON table of the model's heads, from fastkv-eval head-scores", metavar="FILE"
    )
    beta: float = setting(
        1.35, number(1), "a head keeps 1 - 1/BETA of the budget, the rest is shared by its score", metavar="B"
    )

    # Its table says how many entries a head keeps.
    keep_mass: float | None = no_setting(None)
    keep_mass_by: str = no_setting("layer")
    keep_mass_most: float = no_setting(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_scores is None:
            raise FastKVError(
                "headkv needs head_scores, a table of the model's heads; `fastkv-eval head-scores` makes one",
                setting="head_scores",
            )

    @property
    def table(self) -> Table:
        """The scores of each layer and KV head."""
        return cast("Table", self.head_scores)

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        found = (len(self.table), len(self.table[0]))
        if n_layers != found[0] or n_kv_heads not in (None, found[1]):
            raise FastKVError(
                f"head_scores has {found[0]} layers of {found[1]} KV heads, but the model has {n_layers}"
                + ("" if n_kv_heads is None else f" of {n_kv_heads}"),
                setting="head_scores",
            )

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        budgets = self._budgets(n_layers, n_tokens)[layer]
        return self.window + sum(budgets) // len(budgets)

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        import torch

        budgets = self._budgets(n_layers, scores.shape[2] + self.window)[layer]
        return self.window + torch.tensor(budgets, device=scores.device).expand(scores.shape[:2])

    def _budgets(self, n_layers: int, n_tokens: int) -> Budgets:
        """Entries of each layer and head for a prompt of `n_tokens`, the window left out."""
        mean = super().budget(0, n_layers, n_tokens) - self.window
        return _budgets_of(self.table, self.beta, mean, n_tokens - self.window)


@functools.lru_cache(maxsize=64)
def _budgets_of(table: Table, beta: float, mean: int, most: int) -> Budgets:
    return share_out(table, beta, mean, most)
