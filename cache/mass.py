"""How much of what the end of a prompt attends to, and of what comes next there, the cache of each layer holds.

A sign of an answer that was lost. The plain sum of the attention that is kept is none: it is less where a policy keeps
whole passages and answers right than where it keeps single tokens and answers wrong. What tells the two apart was found
by measurement on real chat models (benchmarks/results/2026-11-27-attention-mass.md): an answer is copied from left to
right, through the few heads that attend to its beginning most, and is lost if the tokens after that are not all there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.layer import Kept
from fastkv.cache.policy import Observation
from fastkv.cache.scores import forward_pooled
from fastkv.cache.selection import PerHead

REACH = 16  # tokens after its own to which the attention of a token counts
POWER = 4  # the strongest attention decides
SINKS = 1  # first entries, which attract attention whatever they say (arXiv 2309.17453)
_NOTHING = 1e-30  # too little to be anything: where there is nothing to lose, all is kept


class LayerMass(NamedTuple):
    """Attention mass of one layer: float32 [B] each, on the device.

    kept: of the entries in its cache. total: of all there are; what was dropped before the layer counts as well.
    measured: whether these are sums over the entries; else kept / total is a share, and nothing says of how much.
    """

    kept: Tensor
    total: Tensor
    measured: bool


def attention_mass(peaks: Tensor, window: int) -> Tensor:
    """What each entry weighs: peaks float32 [B, Hkv, T] -> the same shape, 0 for the window and the sinks.

    peaks: the most that any query of the window attends to an entry (Observation.peaks). An entry weighs as much as the
    strongest of its own and the REACH entries before it, to the power of POWER.
    """
    n_tokens = peaks.shape[-1]
    if n_tokens <= SINKS + window:
        return peaks.new_zeros(peaks.shape)
    return F.pad(forward_pooled(peaks[..., SINKS : n_tokens - window], REACH) ** POWER, (SINKS, window))


def kept_mass(mass: Tensor, kept: Kept | Sequence[PerHead]) -> Tensor:
    """What `mass`, [B, Hkv, T], is left in the entries that a layer keeps: float32 [B]."""
    if kept is None:
        return mass.sum(dim=(1, 2))
    if isinstance(kept, Sequence):
        return torch.cat([kept_mass(mass[row : row + 1], of_row) for row, of_row in enumerate(kept)])
    if isinstance(kept, PerHead):
        return mass.flatten(1).gather(1, kept.index).sum(dim=1)
    return mass.gather(2, kept).sum(dim=(1, 2))


class MassOfLayers:
    """Follows one prefill: `layers` has what each layer that ran keeps, None where its policy looked at no window.

    known: whether all tokens of `batch` prompts are there to be seen, none dropped that nobody has measured.
    """

    def __init__(self, batch: int, device: torch.device, known: bool) -> None:
        self.layers: list[LayerMass | None] = []
        self._one = torch.ones(batch, device=device)
        self._left = self._one if known else None  # the share of the mass that reaches the next layer

    def move(self, move: Callable[[Tensor], Tensor]) -> None:
        """The next layers are observed on another device, to which `move` takes a tensor."""
        self._one, self._left = move(self._one), None if self._left is None else move(self._left)
        self.layers = [
            None if each is None else each._replace(kept=move(each.kept), total=move(each.total))
            for each in self.layers
        ]

    def keep_all(self) -> None:
        """A layer keeps all that it saw."""
        self.layers.append(None if self._left is None else LayerMass(self._left, self._one, measured=False))

    def keep_unknown(self) -> None:
        """Nobody measured what a layer keeps."""
        self.layers.append(None)

    def keep(self, observed: Observation, kept: Kept | Sequence[PerHead], window: int) -> None:
        """A layer keeps some of what was observed; kept: None for all. After a look-ahead it may choose again."""
        if observed.drafted is not None:
            self._keep_others(observed, kept, window)
        elif kept is None:
            self.keep_all()
        elif self._left is None or observed.peaks is None:
            self.layers.append(None)
        else:
            mass = attention_mass(observed.peaks, window)
            total = _of_all_heads(observed, mass.sum(dim=(1, 2))) / self._left
            self.layers.append(LayerMass(_of_all_heads(observed, kept_mass(mass, kept)), total, measured=True))

    def _keep_others(self, observed: Observation, kept: Kept | Sequence[PerHead], window: int) -> None:
        """What drafted tokens have chosen is measured by their attention: the window's would miss what it let go."""
        before, drafted = self.layers[observed.layer], observed.drafted
        if before is None or observed.peaks is None or drafted is None:
            return
        seen = _of_all_heads(observed, attention_mass(observed.peaks, window).sum(dim=(1, 2)))
        left = seen / (before.total + _NOTHING)
        peaks = drafted.attention(observed.k).amax(dim=(2, 3)).where(drafted.live[:, :1, None], observed.peaks)
        mass = attention_mass(peaks, window)
        total = _of_all_heads(observed, mass.sum(dim=(1, 2))) / (left + _NOTHING)
        kept_now = _of_all_heads(observed, kept_mass(mass, kept))
        self.layers[observed.layer] = before._replace(kept=kept_now, total=total)

    def propagate(self, observed: Observation, chosen: Tensor | None, window: int) -> None:
        """Of the new tokens observed some are propagated, `chosen` int64 [B, n]; None: all."""
        if chosen is None or self._left is None:
            return
        if observed.peaks is None:
            self._left = None
            return
        mass = attention_mass(observed.peaks, window)[..., observed.n_past :]
        left = _of_all_heads(observed, kept_mass(mass, chosen.unsqueeze(1).expand(-1, mass.shape[1], -1))) + _NOTHING
        self._left = self._left * left / (_of_all_heads(observed, mass.sum(dim=(1, 2))) + _NOTHING)


def _of_all_heads(observed: Observation, sums: Tensor) -> Tensor:
    """Sums over the heads that are seen here, [B] -> over all of the layer."""
    return sums if observed.heads is None else observed.all_heads(sums.unsqueeze(1)).sum(dim=1)


def shares(by_layer: Sequence[LayerMass | None], row: int = 0) -> tuple[float | None, tuple[float | None, ...]]:
    """What one sequence has kept of its attention mass, in [0, 1]: of all layers together, and of each layer.

    A layer that was not measured weighs as much as the others do on average. None where nothing is known of a layer;
    then nothing is known of all of them together. Waits for the device, once.
    """
    known = [layer for layer in by_layer if layer is not None]
    if not known:
        return None, (None,) * len(by_layer)
    values = torch.stack([torch.stack((layer.kept[row], layer.total[row])) for layer in known]).tolist()
    each = [min(1.0, kept / total) if total else 1.0 for kept, total in values]
    measured = [total for layer, (_, total) in zip(known, values, strict=True) if layer.measured and total]
    usual = math.fsum(measured) / len(measured) if measured else 1.0
    weights = [total if layer.measured and measured else usual for layer, (_, total) in zip(known, values, strict=True)]
    together = math.fsum(map(math.prod, zip(weights, each, strict=True))) / math.fsum(weights)
    in_order = iter(each)
    by_layer_shares = tuple(None if layer is None else next(in_order) for layer in by_layer)
    return (together if len(known) == len(by_layer) else None), by_layer_shares
