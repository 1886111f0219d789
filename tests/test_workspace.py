"""Memory that goes from request to request."""

from __future__ import annotations

import threading

import pytest
import torch

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.engine.prefill import Prefill
from fastkv.engine.workspace import BufferPool, Buffers, Workspace

PROMPT = torch.randint(3, 256, (400,), generator=torch.Generator().manual_seed(7)).tolist()
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)


def addresses(llm: LLM) -> tuple[set[int], int]:
    """Where the idle buffers lie, and how large they are."""
    idle = llm._runtime.pool._idle
    assert idle is not None
    assert idle.storage is not None
    tensors = [*idle.workspace._buffers.values(), *idle.storage.k, *idle.storage.v]
    return {tensor.data_ptr() for tensor in tensors}, idle.nbytes


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8)])
def test_the_second_request_takes_the_memory_of_the_first(tiny_llm: LLM, policy: FullKV | FastKV) -> None:
    tiny_llm._runtime.pool.clear()
    first = tiny_llm.generate(PROMPT, PARAMS, policy)
    before = addresses(tiny_llm)
    for prompt in (PROMPT, PROMPT[:100], list(reversed(PROMPT))):
        tiny_llm.generate(prompt, PARAMS, policy)
        assert addresses(tiny_llm) == before
    assert tiny_llm.generate(PROMPT, PARAMS, policy).token_ids == first.token_ids


def test_a_larger_request_makes_room_once(tiny_llm: LLM) -> None:
    pool = tiny_llm._runtime.pool
    pool.clear()
    tiny_llm.generate(PROMPT[:100], PARAMS, FullKV())
    small = pool.idle_bytes
    tiny_llm.generate(PROMPT, PARAMS, FullKV())
    assert pool.idle_bytes > small
    before = addresses(tiny_llm)
    tiny_llm.generate(PROMPT[:100], PARAMS, FullKV())
    assert addresses(tiny_llm) == before


def test_what_a_prefill_returned_is_the_callers_own(tiny_llm: LLM) -> None:
    """A later request would write over a cache that lay in shared memory."""
    kept = tiny_llm.prefill(PROMPT, FastKV(min_tokens=8))
    copy = Prefill(kept.logits.clone(), [t.clone() for t in kept.tokens], [t.clone() for t in kept.kept], kept.cache)
    keys = [k.clone() for k in kept.cache.k]
    tiny_llm.generate(list(reversed(PROMPT)), PARAMS, FullKV())
    tiny_llm.prefill(list(reversed(PROMPT)), FullKV())
    assert torch.equal(kept.logits, copy.logits)
    assert all(torch.equal(a, b) for a, b in zip(kept.tokens, copy.tokens, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept.kept, copy.kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept.cache.k, keys, strict=True))


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


def test_a_workspace_grows_and_never_shrinks() -> None:
    workspace, like = Workspace(), torch.empty(0, dtype=torch.bfloat16)
    first = workspace.take("a", (2, 3), like)
    assert first.shape == (2, 3)
    assert first.dtype == torch.bfloat16
    assert workspace.take("a", (3,), like).data_ptr() == first.data_ptr()
    assert workspace.nbytes == 12
    assert workspace.take("a", (7,), like).shape == (7,)
    assert workspace.take("b", (1,), like).data_ptr() != first.data_ptr()
    assert workspace.nbytes == 16


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


def test_storage_grows_to_hold_both_sizes() -> None:
    buffers, cpu = Buffers(), torch.device("cpu")
    first = buffers.storage_for([64, 32], 1, (2, 4), torch.float32, cpu)
    assert buffers.storage_for([32, 32], 1, (2, 4), torch.float32, cpu) is first
    second = buffers.storage_for([32, 96], 1, (2, 4), torch.float32, cpu)
    assert second.capacities == [64, 96]
    assert buffers.storage_for([32, 32], 2, (2, 4), torch.float32, cpu).batch == 2
    assert buffers.storage_for([32, 32], 1, (2, 4), torch.float32, cpu).batch == 2  # room for two is room for one
