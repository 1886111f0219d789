"""How much layers differ in what they store, and a model's outputs once some layers read others.

No cache and no policy: every layer sees every token. What is measured is what changes by the sharing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.cache.layer_map import Sources
from fastkv.engine.attention import causal_attention
from fastkv.models.llama import Llama

_AT_A_TIME = 2048  # tokens of equally long texts that run through the model together

See = Callable[[int, Tensor, Tensor], None]  # a layer, its k and v [B, Hkv, T, D], k rotated


def batches(texts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """All texts, those of the same length together: int64 [B, T] each."""
    found: list[Tensor] = []
    for length in sorted({len(text) for text in texts}):
        alike = torch.tensor([text for text in texts if len(text) == length], device=device)
        found += alike.split(max(1, _AT_A_TIME // length))
    return found


@torch.inference_mode()
def final_hidden(model: Llama, ids: Tensor, sources: Sources, see: See | None = None) -> Tensor:
    """What the head is given, [B, T, E], of ids int64 [B, T], where layers attend to K and V of their sources."""
    hidden, rope = model.embed(ids), model.rope_of_range(0, ids.shape[1])
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, block in enumerate(model.blocks):
        source = sources[layer]
        if source == layer:
            q, k, v = block.project(hidden, rope)
            if layer in sources[layer + 1 :]:
                held[layer] = k, v
        else:
            q, (k, v) = block.project_q(hidden, rope), held[source]
        if see is not None:
            see(layer, k, v)
        block.finish_(hidden, causal_attention(q, k, v, model.config.windows[layer]))
    return model.norm(hidden)


class MeanEntries:
    """K and V of each layer at each position, the mean over the texts that reach it."""

    def __init__(self, n_layers: int, length: int) -> None:
        self._sums: list[Tensor | None] = [None] * n_layers  # float64 [2, Hkv, length, D]
        self._counts = torch.zeros(length, dtype=torch.float64)

    def add(self, model: Llama, ids: Tensor) -> Tensor:
        """Run texts, int64 [B, T], through the model as it is: what its head is given, [B, T, E]."""
        self._counts[: ids.shape[1]] += ids.shape[0]
        return final_hidden(model, ids, tuple(range(len(self._sums))), self._see)

    def _see(self, layer: int, k: Tensor, v: Tensor) -> None:
        seen = torch.stack((k, v)).double().sum(dim=1).cpu()  # [2, Hkv, T, D]
        sums = self._sums[layer]
        if sums is None:
            n_kv_heads, _, head_dim = seen.shape[1:]
            sums = self._sums[layer] = seen.new_zeros(2, n_kv_heads, len(self._counts), head_dim)
        sums[:, :, : seen.shape[2]] += seen

    def distances(self) -> Tensor:
        """Euclidean distances of the layers' means, all heads, positions and channels of K and V: float64 [L, L]."""
        known = [sums for sums in self._sums if sums is not None]
        means = torch.stack([(sums / self._counts[:, None]).flatten() for sums in known])
        return torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")


def mean_cosine(model: Llama, texts: Iterable[tuple[Tensor, Tensor]], sources: Sources) -> float:
    """The mean over all tokens of the cosine between what the head was given and is given with these sources.

    texts: ids int64 [B, T] and what the head was given, [B, T, E].
    """
    total, count = 0.0, 0
    for ids, before in texts:
        cosines = F.cosine_similarity(before.float(), final_hidden(model, ids, sources).float(), dim=-1)
        total, count = total + float(cosines.double().sum()), count + ids.numel()
    return total / count
