"""Which heads copy: how often a head's strongest attention falls on the token of the prompt that is being copied.

The retrieval score of arXiv 2404.15574, by which HeadKV (arXiv 2410.19258) shares out the cache. A prompt asks for an
answer that stands in it word for word. It is read into a full cache, and the answer is then given token by token,
whatever the model predicts. A hit of a head is a step at which, of all keys up to its own, its query scores one of the
answer in the prompt highest, and the token there is the one that comes next.

What differs from arXiv 2404.15574: the answer is given, where the paper lets the model generate and counts only the
texts that it gets right; and the needle is the answer alone, where the paper's is a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policies import FullKV
from fastkv.engine.decode import run_layers
from fastkv.engine.decode_attention import EagerAttention
from fastkv.engine.llm import LLM


@dataclass(frozen=True)
class Needle:
    """Token ids of a prompt and of its answer, which also stand in the prompt from position `place` on."""

    prompt: list[int]
    answer: list[int]
    place: int

    def sources(self, step: int) -> list[int]:
        """The positions of the needle that hold the answer's token `step`; more than one where it comes up again."""
        return [self.place + i for i, token in enumerate(self.answer) if token == self.answer[step]]


@dataclass(frozen=True)
class Copying:
    """What the heads did while one answer of m tokens was copied.

    hits: bool [m, L, Hq]. predicted: bool [m], whether the model's own most probable token was the answer's.
    """

    hits: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class HeadScores:
    """Shares of the copied tokens, in [0, 1], the mean over examples that count the same.

    query_heads: float64 [L, Hq]. kv_heads: float64 [L, Hkv], the mean over the query heads that read a KV head.
    predicted: of the copied tokens, those that were the model's own prediction.
    """

    query_heads: Tensor
    kv_heads: Tensor
    predicted: float


def find_needle(prompt: list[int], continued: list[int]) -> Needle | None:
    """prompt: its token ids; continued: those of the same text with the answer after it.

    None where the answer's tokens are no continuation of the prompt's, or do not stand in the prompt exactly once: the
    same letters may be other tokens there, and then there is no token to copy.
    """
    n_tokens = len(prompt)
    answer = continued[n_tokens:]
    if not answer or continued[:n_tokens] != prompt:
        return None
    starts = range(n_tokens - len(answer) + 1)
    places = [start for start in starts if prompt[start : start + len(answer)] == answer]
    return Needle(prompt, answer, places[0]) if len(places) == 1 else None


@torch.inference_mode()
def watch_copying(llm: LLM, needle: Needle) -> Copying:
    """Read the prompt, then give the answer token by token. Raises FastKVError where they do not fit the model.

    The answer's first token is predicted by the prompt's last one, which is therefore a step and no part of the
    prefill; the answer's last token, which predicts what comes after it, is never read.
    """
    cache = llm.prefill(needle.prompt[:-1], FullKV(), max_tokens=len(needle.answer)).cache
    hits, predicted = list[Tensor](), list[Tensor]()
    for step, token in enumerate([needle.prompt[-1], *needle.answer[:-1]]):
        attention = _NotingAttention(llm, cache)
        ids = torch.tensor([[token]], device=llm.device)
        logits = run_layers(llm.model, ids, cache.next_position.unsqueeze(1), attention)
        cache.advance()
        strongest = torch.stack(attention.strongest)  # positions, int64 [L, Hq]
        hits.append(torch.isin(strongest, torch.tensor(needle.sources(step), device=llm.device)))
        predicted.append(logits[0, 0].argmax() == needle.answer[step])
    return Copying(torch.stack(hits).cpu(), torch.stack(predicted).cpu())


class _NotingAttention:
    """Attention of one decode step (a StepAttention) that notes the strongest entries of each layer: int64 [Hq]."""

    def __init__(self, llm: LLM, cache: KVCache) -> None:
        self._cache, self._windows = cache, llm.config.windows
        self._attend = EagerAttention(cache.pool, [cache.slots], 1, self._windows)
        self.strongest: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = self._attend(layer, q, k, v)
        (part,) = self._cache.layers[layer].read(self._cache.slots, new=1)
        window = self._windows[layer]
        out_of_sight = 0 if window is None else max(0, part.k.shape[2] - window)
        # In a full cache, entry i is position i.
        self.strongest.append(out_of_sight + strongest_entry(q, part.k[:, :, out_of_sight:]))
        return attended


def strongest_entry(q: Tensor, keys: Tensor) -> Tensor:
    """int64 [Hq]: of the n keys [1, Hkv, n, D], the one that each query head of q [1, Hq, 1, D] attends to most."""
    rows = q[0, :, 0].unflatten(0, (keys.shape[1], -1)).float()  # [Hkv, G, D]
    # In float32, because 16 bits would make ties; one KV head at a time, because that is a copy of its keys.
    return torch.cat([(of_head @ head.float().T).argmax(dim=1) for of_head, head in zip(rows, keys[0], strict=True)])


def head_scores(parts: Sequence[Copying], n_kv_heads: int) -> HeadScores:
    """The scores of all examples together; every example counts the same, however long its answer."""
    query_heads = torch.stack([part.hits.double().mean(dim=0) for part in parts]).mean(dim=0)
    kv_heads = query_heads.unflatten(1, (n_kv_heads, -1)).mean(dim=2)
    predicted = torch.stack([part.predicted.double().mean() for part in parts]).mean()
    return HeadScores(query_heads, kv_heads, predicted.item())
