"""What is timed: this engine under a policy, one prompt or several at a time, and the peer. Knows no table.

Ours go through `LLM.generate`, as a user's would: each prompt is prefilled on its own, then all decode together. The
peer takes all prompts at a time through its own model, greedily: tokens stay on the device, which is waited for after
the first token and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from cost import wait_for
from torch import Tensor

from fastkv import LLM, FastKVError, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Policy
from fastkv.engine.memory import explain_out_of_memory, peak_bytes, start_peak
from fastkv.engine.output import Metrics
from fastkv.kernels.out_of_memory import REQUEST

State = TypeVar("State")


@dataclass(frozen=True)
class Sample:
    """One run: seconds to the first token of every prompt, tokens/s of all prompts together after it, and seconds of
    both. Bytes: None for what is not measured.
    """

    ttft_s: float
    decode_tokens_per_s: float
    total_s: float
    kv_bytes: int | None = None
    peak_bytes: int | None = None


Runner = Callable[[Tensor, int], Sample]  # prompts int64 [B, N] on the host, tokens to generate for each


def engine(llm: LLM, policy: Policy) -> Runner:
    """A policy of this engine. Raises FastKVError where memory is too short for all prompts at a time."""

    def run(ids: Tensor, new_tokens: int) -> Sample:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return together([each.metrics for each in llm.generate(ids.tolist(), params, policy, batch_size=len(ids))])

    return run


def together(each: Sequence[Metrics]) -> Sample:
    """The figures of prompts that were given in one call, all decoding together."""
    decoding = [(one.new_tokens - 1) / one.decode_tokens_per_s for one in each if one.decode_tokens_per_s is not None]
    begun = max(one.ttft_s for one in each)
    ended = [one.ttft_s + seconds for one, seconds in zip(each, decoding, strict=True)]
    if min(ended) < begun:
        raise FastKVError(f"--batch {len(each)}: not all of these prompts fit into memory at a time; take fewer")
    speed = sum(one.new_tokens - 1 for one in each) / (max(ended) - begun)
    peaks = [one.peak_bytes for one in each if one.peak_bytes is not None]
    return Sample(begun, speed, max(ended), sum(one.kv_bytes for one in each), max(peaks, default=None))


def transformers(llm: LLM) -> Runner:
    """Hugging Face's model on the same weights."""
    from peer import transformers_peer

    start, step = transformers_peer(llm)

    def run(ids: Tensor, new_tokens: int) -> Sample:
        with explain_out_of_memory(REQUEST):
            return greedy(lambda: start(ids), step, llm.device, len(ids), new_tokens)

    return run


def greedy(
    start: Callable[[], State], step: Callable[[State], State], device: torch.device, batch: int, new_tokens: int
) -> Sample:
    """Time `start`, which gives every prompt its first token, and a `step` for each of the other new_tokens - 1."""
    start_peak(device)
    begun = time.perf_counter()
    state = start()
    wait_for(device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        state = step(state)
    wait_for(device)
    ended = time.perf_counter()
    speed = batch * (new_tokens - 1) / (ended - first)
    return Sample(first - begun, speed, ended - begun, peak_bytes=peak_bytes(device))


def runners(llm: LLM, policies: Sequence[str], peer: Runner | None) -> dict[str, Runner]:
    """Everyone that is compared, by name."""
    found = {name: engine(llm, POLICIES[name]()) for name in policies}
    return found if peer is None else {**found, "transformers": peer}


def random_prompts(vocab_size: int, context: int, batch: int) -> Iterator[Tensor]:
    """Prompts int64 [batch, context], other ones each time, the same in each run of the command."""
    generator = torch.Generator().manual_seed(context)
    while True:
        yield torch.randint(vocab_size, (batch, context), generator=generator)


def measure(
    runs: dict[str, Runner],
    prompts: Iterator[Tensor],
    new_tokens: int,
    rounds: int,
    warm_ups: int,
    free: Callable[[], None] | None = None,
) -> dict[str, list[Sample]]:
    """`rounds` samples of each, taken in turn after `warm_ups` rounds that are not counted.

    free: lets go of the memory that runs hand to one another. With it, peaks are those of the first warm-up, where each
    run begins without what another has left; without a warm-up there is no peak.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = {}
    for counted, ids in zip(range(-warm_ups, rounds), prompts):  # noqa: B905 - there is no end to the prompts
        for name, run in runs.items():
            alone = free is not None and name not in peaks and counted < 0
            if alone and free is not None:
                free()
            sample = run(ids, new_tokens)
            if alone:
                peaks[name] = sample.peak_bytes
            if counted >= 0:
                samples[name].append(sample if free is None else replace(sample, peak_bytes=peaks.get(name)))
    return samples
