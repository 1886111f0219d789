"""The sampler on a GPU: one captured graph serves all slots, nothing waits for the host, tokens are those of a CPU.

Skipped where torch sees no CUDA device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import SamplingParams
from fastkv.engine.counter_rng import stream_of, uniform
from fastkv.engine.sampler import NOT_FINITE, Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

V, STEPS = 32_001, 40
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"repetition_penalty": 1.7},
    {"temperature": 0.7, "top_k": 30, "seed": 2},
    {"temperature": 1.3, "top_p": 0.8, "seed": 3},
    {"temperature": 1.2, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
]
N = len(SETTINGS)
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = torch.randint(V, (N, 50), generator=GENERATOR)
LOGITS = torch.randn(STEPS, N, V, generator=GENERATOR) * 3


def started(device: str) -> Sampler:
    sampler = Sampler(N, V, torch.device(device))
    for slot, settings in enumerate(SETTINGS):
        sampler.start(slot, SamplingParams(**settings), PROMPTS[slot].to(device))
    return sampler


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """int64 [STEPS, N], from a CPU."""
    sampler = started("cpu")
    return torch.stack([sampler.sample(logits, torch.ones(N, dtype=torch.bool)) for logits in LOGITS])


def test_random_numbers_are_those_of_a_cpu() -> None:
    seeds, steps = torch.arange(2**62, 2**62 + 10_000), torch.arange(10_000)
    assert torch.equal(uniform(stream_of(seeds.cuda()), steps.cuda()).cpu(), uniform(stream_of(seeds), steps))


def test_one_captured_graph_gives_the_tokens_of_a_cpu(expected: Tensor) -> None:
    """Warmed up and captured for no slot at all: no state has changed when the sequences begin. One row is NaN once."""
    sampler, logits = started("cuda"), torch.zeros(N, V, device="cuda")
    active, tokens = torch.zeros(N, dtype=torch.int64, device="cuda"), torch.zeros(N, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            sampler.sample(logits, active)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens.copy_(sampler.sample(logits, active))
    active.fill_(1)
    for step in range(STEPS):
        logits.copy_(LOGITS[step])
        graph.replay()
        assert tokens.tolist() == expected[step].tolist(), step
    logits[1, 5] = torch.nan
    graph.replay()
    assert tokens[1] == NOT_FINITE
    assert (tokens[2:] >= 0).all()


def test_slots_one_by_one_give_the_tokens_of_a_cpu_and_wait_for_nothing(expected: Tensor) -> None:
    sampler, logits = started("cuda"), LOGITS.cuda()
    slots = torch.arange(N, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [[sampler.sample_slots(logits[t, s : s + 1], slots[s : s + 1]) for s in range(N)] for t in range(STEPS)]
        sampler.stop(0)
        sampler.start(0, SamplingParams(temperature=1.0, repetition_penalty=2.0), slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [[int(token) for token in step] for step in found] == expected.tolist()
