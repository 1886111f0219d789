"""Beginning: what several prompts of a list begin with, read once, with the first of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastkv.cache.layer import KVLayer
from fastkv.cache.snapshot import Snapshot
from fastkv.engine.plan import RequestPlan


@dataclass(eq=False)
class Beginning:
    """Tokens that some prompts share. To plan what comes after them, it is what they will have left (see plan.Past).

    ids: int64 [1, P], on the host. plan: of reading them. waiting: prompts that have not continued from it yet.
    snapshot: what reading has left, there while any of them waits. layer_tokens: how many of the tokens each layer saw.
    """

    ids: Tensor
    plan: RequestPlan
    waiting: int
    snapshot: Snapshot | None = None
    layer_tokens: tuple[int, ...] = ()

    def keep(self, snapshot: Snapshot, layer_tokens: list[int]) -> None:
        """It has been read."""
        self.snapshot, self.layer_tokens = snapshot, tuple(layer_tokens)

    def taken(self) -> None:
        """One prompt has what it needs of it; after the last one it is let go."""
        self.waiting -= 1
        if not self.waiting:
            self.snapshot = None

    # --- what will be there ---

    @property
    def position(self) -> int:
        """The next token's."""
        return self.plan.n_tokens

    @property
    def whole_from(self) -> int:
        """From here on every layer holds every token."""
        return self.plan.n_tokens if self.plan.compresses else 0

    @property
    def layout(self) -> type[KVLayer]:
        """How its entries are stored."""
        return self.plan.layout

    @property
    def is_even(self) -> bool:
        """Whether the heads of each layer surely have the same number of entries."""
        return not self.layout.per_head

    def count(self, layer: int) -> int:
        """Entries of the longest head of a layer, at most."""
        return self.plan.n_tokens if self.layout.per_head else self.plan.layers[layer].kept

    def mean(self, layer: int) -> int:
        """Entries of a head of a layer on average, at most."""
        return self.plan.layers[layer].kept
