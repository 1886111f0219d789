"""GemFilter: the lower layers choose tokens, and the whole model reads these alone (arXiv 2409.17422)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.compressed import Compressed, odd_width
from fastkv.cache.policy import FirstPass, Observation
from fastkv.cache.setting import setting, whole
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor

_MEASURED = {32: 13}  # layers of a model -> the paper's layer, where it is not the one below half way up


@dataclass(frozen=True, kw_only=True)
class GemFilter(Compressed):
    """A first pass up to `filter_layer` chooses tokens; then the prompt is what was chosen, at positions of its own.

    filter_layer: where the last token's query scores the keys; None means 13 in a model of 32 layers, as in the paper,
    and max(0, L // 2 - 1) of L layers elsewhere. kv_retention, kv_len, min_tokens: the tokens that are chosen, all of
    which every layer keeps. kernel: width of the average pooling of the scores, odd.

    What differs from the paper: the prompt's last token is always chosen. Every layer above the filter never sees what
    was dropped, and positions in the answer count from the chosen tokens. Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "gemfilter"
    window = 1

    filter_layer: int | None = setting(
        None, whole(0), "layer that chooses what the model reads anew", metavar="I", unset="below half way up"
    )
    kernel: int = setting(5, odd_width(), "width of the pooling of scores, odd", metavar="K")

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        if self.filter_layer_of(n_layers) >= n_layers:
            raise FastKVError(
                f"filter_layer must be below the model's number of layers ({n_layers}), not {self.filter_layer}",
                setting="filter_layer",
            )

    def settings(self, n_layers: int) -> dict[str, object]:
        return super().settings(n_layers) | {"filter_layer": self.filter_layer_of(n_layers)}

    def filter_layer_of(self, n_layers: int) -> int:
        """The layer that chooses in a model of `n_layers`, the default worked out."""
        if self.filter_layer is not None:
            return self.filter_layer
        return _MEASURED.get(n_layers, max(0, n_layers // 2 - 1))

    def first_pass(self, n_layers: int, n_tokens: int) -> FirstPass | None:
        keep = self.budget(0, n_layers, n_tokens)
        return FirstPass(self.filter_layer_of(n_layers), keep) if keep < n_tokens else None

    def score(self, observed: Observation) -> Tensor:
        from fastkv.cache.scores import last_query_scores

        return last_query_scores(observed.q, observed.k, self.kernel)
