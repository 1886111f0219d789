"""A layout that the engine has never heard of works with it: prefill, decoding, batches, going on, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkv import LLM, FullKV, SamplingParams, SnapKV
from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import Kept, LayerMemory, Part


class GrowingLayer:
    """Each slot is a tensor of its own, [2, Hkv, n, D], which is made anew whenever it grows. No flat memory."""

    per_head = False
    kv_dtype = None

    def __init__(self, memory: LayerMemory) -> None:
        self.capacity, self.lengths = memory.capacity, memory.lengths
        self._empty = torch.zeros(2, memory.shape.n_kv_heads, 0, memory.shape.head_dim, dtype=memory.shape.dtype)
        self._slots = [self._empty] * len(memory.appended)

    bytes_of = staticmethod(DenseLayer.bytes_of)

    def span(self, slot: int) -> int:
        return self.capacity

    def count(self, slot: int) -> int:
        return int(self.lengths[slot, 0])

    def entries(self, slot: int) -> int:
        return int(self.lengths[slot].sum())

    def forgettable(self, slot: int) -> int:
        return self.count(slot)

    def attend(self, slots: range, q: Tensor, window: int | None = None) -> Tensor:
        raise NotImplementedError("the engine attends to what `read` gives")

    def store(self, slots: range, k: Tensor, v: Tensor, kept: Kept, room: int) -> None:
        if isinstance(kept, Tensor):
            index = kept.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
            k, v = k.gather(2, index), v.gather(2, index)
        for slot, *entry in zip(slots, k, v, strict=True):
            self._slots[slot] = torch.stack(entry)
        self.lengths[slots.start : slots.stop] = k.shape[2]

    def extend(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        self.append(slots, k, v, places)
        self.lengths[slots.start : slots.stop] += k.shape[2]

    def append(self, slots: range, k: Tensor, v: Tensor, places: Tensor) -> None:
        for slot, *entry in zip(slots, k, v, strict=True):
            self._slots[slot] = torch.cat((self._slots[slot][:, :, : self.count(slot)], torch.stack(entry)), dim=2)

    write = append

    def read(self, slots: range, new: int = 0) -> list[Part]:
        return [
            Part(*(half[None] for half in self._slots[slot]), slice(index, index + 1))
            for index, slot in enumerate(slots)
        ]

    def padded(self, slots: range, span: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("only where graphs are captured")

    def flat(self) -> None:
        return None

    def truncate(self, slots: range, count: int) -> None:
        for slot in slots:
            self._slots[slot] = self._slots[slot][:, :, : self.count(slot) - count]
        self.lengths[slots.start : slots.stop] -= count

    def clear(self, slots: range) -> None:
        for slot in slots:
            self._slots[slot] = self._empty
        self.lengths[slots.start : slots.stop] = 0

    def state(self, slot: int) -> dict[str, Tensor]:
        return {"entries": self._slots[slot]}

    def restore(self, slot: int, state: dict[str, Tensor], room: int) -> None:
        self._slots[slot] = state["entries"]
        self.lengths[slot] = state["entries"].shape[2]


class FullGrowing(FullKV):
    layout = GrowingLayer


class SnapGrowing(SnapKV):
    layout = GrowingLayer


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(3, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def test_another_layout_gives_the_same(tiny_llm: LLM) -> None:
    """Every pair of policies differs in the layout alone."""
    for plain, other in ((FullKV(), FullGrowing()), (SnapKV(kv_len=30), SnapGrowing(kv_len=30))):
        logits = []
        for policy in (plain, other):
            pre = tiny_llm.prefill(ids(120, 0), policy, 3)
            assert isinstance(pre.cache.layers[0], GrowingLayer) == (policy is other)
            found = [pre.logits, tiny_llm.decode(pre.cache, ids(2, 1))[:, -1]]
            pre.cache.truncate(1)
            found.append(tiny_llm.prefill(ids(40, 2), policy, 3, cache=pre.cache).logits)
            found.append(tiny_llm.decode(pre.cache, ids(1, 3))[:, -1])
            logits.append(torch.cat(found))
        torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_another_layout_continues_several_sequences(tiny_llm: LLM) -> None:
    """Its parts are of one sequence each: a prefill that selects anew must read them all."""
    prompts, more = (torch.cat((ids(count, 0), ids(count, 1))) for count in (90, 40))
    logits = []
    for policy in (SnapKV(kv_len=30), SnapGrowing(kv_len=30)):
        cache = tiny_llm.prefill(prompts, policy).cache
        logits.append(tiny_llm.prefill(more, policy, cache=cache).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_another_layout_decodes_in_a_batch(tiny_llm: LLM) -> None:
    prompts = [ids(count, count)[0].tolist() for count in (90, 40, 70)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    found = tiny_llm.generate(prompts, params, FullGrowing(), batch_size=2)
    expected = tiny_llm.generate(prompts, params, FullKV(), batch_size=2)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
