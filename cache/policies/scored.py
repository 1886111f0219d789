"""What methods share whose scores may also say how many entries a layer keeps, not only which ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.policy import Observation
from fastkv.cache.setting import choice, number, setting
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor

KEEP_MASS_HELP = "share of the score mass that a layer keeps, in as few entries as that takes"
KEEP_MASS_BY_HELP = "layer: as many entries in each KV head as the neediest needs; head: as many as each needs"
KEEP_MASS_MOST_HELP = "share of the prompt that --keep-mass keeps at most"


@dataclass(frozen=True, kw_only=True)
class Scored(Compressed):
    """Compressed by scores, to a number of entries that is given, or to one that they decide.

    keep_mass: in (0, 1], in place of kv_retention, over which it wins, and not with kv_len: each layer keeps the best
    entries, as few as hold this share of the mass; 1 keeps all. What the mass is, `mass` says. keep_mass_by: "layer":
    the KV heads of a layer keep equally many, as many as the neediest of them needs (and of prompts that are prefilled
    as one tensor, the neediest); where the heads of a layer compete, as few as hold the share of the layer's sum.
    "head": each head keeps as many as it needs by itself; not where heads compete. keep_mass_most: no layer keeps more
    than this share of the prompt, even if less mass is kept then. None keeps fewer than min_tokens and the window.

    How many entries that is shows in the prefill, and memory is there before: for keep_mass_most. Not where the layers
    of the model compete for one budget.
    """

    keep_mass: float | None = setting(
        None, number(0, 1, above=True), KEEP_MASS_HELP, metavar="P", unset="--kv-retention says how many"
    )
    keep_mass_by: str = setting("layer", choice("layer", "head"), KEEP_MASS_BY_HELP, metavar="layer|head")
    keep_mass_most: float = setting(1.0, number(0, 1, above=True), KEEP_MASS_MOST_HELP, metavar="R")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_mass is None:
            self._refuse_others("keep_mass_by", "keep_mass_most", why="is for keep_mass; set that, or leave it out")
            return
        self._refuse_others("kv_len", why="does not go with keep_mass; leave it out")
        if self.over_layers:
            raise FastKVError("keep_mass is for layers that do not compete for one budget", setting="keep_mass")
        if self.heads_compete and self.keep_mass_by == "head":
            raise FastKVError(
                f"the heads of {self.name} compete for their layer's budget: leave keep_mass_by at layer",
                setting="keep_mass_by",
            )

    def _refuse_others(self, *names: str, why: str) -> None:
        """FastKVError for the first of these settings that is not at its default."""
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise FastKVError(f"{name} {why}", setting=name)

    @property
    def heads_compete(self) -> bool:
        """Whether `head_budgets` share out the budget of a layer."""
        return not isinstance(type(self).per_head, property)

    @property
    def per_head(self) -> bool:
        return self.keep_mass is not None and self.keep_mass_by == "head"

    @property
    def scores_decide(self) -> bool:
        """Whether it is the scores that say how many entries a layer keeps."""
        return self.keep_mass is not None and self.keep_mass < 1

    def most(self, n_tokens: int) -> int:
        """Entries that a layer keeps of a prompt of `n_tokens`, at most."""
        if self.keep_mass is None:
            return self.count(self.kv_len, self.kv_retention, n_tokens)
        return self.count(None, self.keep_mass_most, n_tokens)

    def fewest(self, n_tokens: int) -> int:
        """The same at the least."""
        return self.count(None, 0.0, n_tokens) if self.scores_decide else self.most(n_tokens)

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return self.most(n_tokens)

    def least(self, layer: int, n_layers: int, n_tokens: int) -> int:
        budget = self.budget(layer, n_layers, n_tokens)
        return min(self.fewest(n_tokens), budget) if self.scores_decide else budget

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        import torch

        return torch.full(scores.shape[:2], count, device=scores.device)

    def counts(self, observed: Observation, n_layers: int, scores: Tensor, least: int, most: int) -> Tensor | int:
        from fastkv.cache.keep_mass import smallest, smallest_of_each
        from fastkv.cache.scores import best

        assert self.keep_mass is not None, "else the budget is given"
        mass = self.mass(observed, scores)
        before, of_window = mass[..., : -self.window], mass[..., -self.window :].sum(dim=-1)
        wanted = self.keep_mass * mass.sum(dim=-1)

        def held(counts: Tensor | int) -> Tensor:
            chosen = best(self.ranking(observed, scores, counts), counts - self.window)
            return (before * chosen).sum(dim=-1) + of_window

        if self.per_head and not self.heads_compete:
            return smallest_of_each(held, wanted, least, most)
        scores_of_all, wanted_of_all = observed.all_heads(scores), observed.all_heads(wanted)

        def enough(count: int) -> bool:
            return bool((observed.all_heads(held(count)) >= wanted_of_all).all())

        def enough_together(count: int) -> bool:
            counts = self.head_budgets(observed.layer, n_layers, count, scores_of_all)
            together = observed.all_heads(held(observed.own_heads(counts))).sum(dim=1)
            return bool((together >= wanted_of_all.sum(dim=1)).all())

        return smallest(enough_together if self.heads_compete else enough, least, most)

    def mass(self, observed: Observation, scores: Tensor) -> Tensor:
        """What `keep_mass` counts of each entry, at least 0: float32 [B, Hkv, n_past + T].

        Here the scores, of which those below 0 are counted from the least one of a head; the window, which has none,
        weighs nothing.
        """
        from torch.nn.functional import pad

        return pad(scores - scores.amin(dim=-1, keepdim=True).clamp(max=0), (0, self.window))
