"""Memory that goes from request to request: activations, slots, and the graphs that are bound to them."""

from __future__ import annotations

import threading

import pytest
import torch

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.cache.dense import DenseLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.engine.buffers import BufferPool, Buffers
from fastkv.engine.prefill import Prefill

PROMPT = torch.randint(3, 256, (400,), generator=torch.Generator().manual_seed(7)).tolist()
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def addresses(llm: LLM) -> tuple[set[int], int]:
    """Where the idle buffers lie, and how large they are."""
    idle = llm._runtime.buffers._idle
    assert idle is not None
    assert idle.state is not None
    slots = [rows for layer in idle.state.pool.layers for rows in layer.flat() or ()]
    tensors = [*idle.workspace._buffers.values(), *slots, idle.state.tokens]
    return {tensor.data_ptr() for tensor in tensors}, idle.nbytes


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8)])
def test_the_second_request_takes_the_memory_of_the_first(tiny_llm: LLM, policy: FullKV | FastKV) -> None:
    tiny_llm.free_buffers()
    first = tiny_llm.generate(PROMPT, PARAMS, policy)
    before = addresses(tiny_llm)
    for prompt in (PROMPT, PROMPT[:100], list(reversed(PROMPT))):
        tiny_llm.generate(prompt, PARAMS, policy)
        assert addresses(tiny_llm) == before
    assert tiny_llm.generate(PROMPT, PARAMS, policy).token_ids == first.token_ids


def test_a_larger_request_makes_room_once(tiny_llm: LLM) -> None:
    pool = tiny_llm._runtime.buffers
    pool.clear()
    tiny_llm.generate(PROMPT[:100], PARAMS, FullKV())
    small = pool.idle_bytes
    tiny_llm.generate(PROMPT, PARAMS, FullKV())
    assert pool.idle_bytes > small
    before = addresses(tiny_llm)
    tiny_llm.generate(PROMPT[:100], PARAMS, FullKV())
    assert addresses(tiny_llm) == before


def test_what_a_prefill_returned_is_the_callers_own(tiny_llm: LLM) -> None:
    """A later request would write over a cache that lay in memory that requests share."""
    kept = tiny_llm.prefill(PROMPT, FastKV(min_tokens=8))
    copy = Prefill(kept.logits.clone(), [t.clone() for t in kept.tokens], [t.clone() for t in kept.kept], kept.cache)
    keys = [kept.cache.read(layer)[0].k.clone() for layer in range(6)]
    tiny_llm.generate(list(reversed(PROMPT)), PARAMS, FullKV())
    tiny_llm.prefill(list(reversed(PROMPT)), FullKV())
    assert torch.equal(kept.logits, copy.logits)
    assert all(torch.equal(a, b) for a, b in zip(kept.tokens, copy.tokens, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept.kept, copy.kept, strict=True))
    assert all(torch.equal(kept.cache.read(layer)[0].k, before) for layer, before in enumerate(keys))


def test_requests_of_several_threads_are_apart(tiny_llm: LLM) -> None:
    prompts = [PROMPT[start : start + 150] for start in range(0, 250, 50)]
    expected = [tiny_llm.generate(prompt, PARAMS, FullKV()).token_ids for prompt in prompts]
    found: dict[int, list[int]] = {}

    def run(index: int) -> None:
        found[index] = tiny_llm.generate(prompts[index], PARAMS, FullKV()).token_ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(5)] == expected


def test_the_pool_keeps_the_larger_of_two() -> None:
    pool, like = BufferPool(), torch.empty(0)
    one, other = pool.lease(), pool.lease()
    assert one is not other
    one.workspace.take("a", (10,), like)
    other.workspace.take("a", (5,), like)
    pool.give_back(one)
    pool.give_back(other)
    assert pool.idle_bytes == 40
    assert pool.lease() is one
    assert pool.idle_bytes == 0


def test_slots_are_used_again_or_grow_to_hold_both_sizes(tiny_llm: LLM) -> None:
    buffers, model = Buffers(), tiny_llm._model
    first = buffers.state_for(DenseLayer, [64, 32], 1, model)
    assert buffers.state_for(DenseLayer, [32, 32], 1, model) is first
    second = buffers.state_for(DenseLayer, [32, 96], 1, model)
    assert second.pool.capacities == [64, 96]
    assert buffers.state_for(DenseLayer, [32, 32], 2, model).pool.n_slots == 2
    assert buffers.state_for(DenseLayer, [32, 32], 1, model).pool.n_slots == 2  # room for two is room for one
    other = buffers.state_for(PerHeadLayer, [32, 32], 1, model)
    assert (other.pool.layout, other.pool.capacities) == (PerHeadLayer, [32, 32])


def test_graphs_go_with_the_slots_that_they_are_bound_to(tiny_llm: LLM) -> None:
    buffers, bound = Buffers(), object()
    buffers.state_for(DenseLayer, [32], 1, tiny_llm._model)
    buffers.stepper = bound  # type: ignore[assignment]
    buffers.state_for(DenseLayer, [32], 1, tiny_llm._model)
    assert buffers.stepper is bound
    buffers.state_for(DenseLayer, [64], 1, tiny_llm._model)
    assert buffers.stepper is None


def test_what_is_held_is_told(tiny_llm: LLM) -> None:
    buffers = Buffers()
    assert buffers.nbytes == 0
    buffers.workspace.take("a", (10,), torch.empty(0))
    assert buffers.nbytes == 40
    state = buffers.state_for(DenseLayer, [32], 2, tiny_llm._model)
    assert buffers.nbytes == 40 + state.pool.nbytes
