"""Several threads with one model, and processes that are forked from one that has a model."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.engine import process
from fastkv.engine.one_reader import OneReader
from fastkv.engine.process import check_process, process_for_model
from fastkv.models import layers
from fastkv.models.layers import RotaryEmbedding, RotaryEmbeddings
from fastkv.models.rope_config import RopeConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def often_in_turn() -> Iterator[None]:
    """Threads take turns every few operations, so that what can go wrong between two of them does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each thread gave or raised; all of them begin at the same moment."""
    barrier, results = threading.Barrier(len(works)), [None] * len(works)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = works[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return results


# --- the rotary table -------------------------------------------------------------------------------------------------


def test_a_table_never_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that wants less begins first and is held up until the other one would be done."""
    table, began, held = RotaryEmbedding(RopeConfig(), 8), threading.Event(), threading.Event()
    monkeypatch.setattr(layers, "_SMALLEST_TABLE", 4)
    real = RotaryEmbedding._grow

    def slow(self: RotaryEmbedding, n_positions: int, dtype: torch.dtype) -> None:
        if n_positions == 5:
            began.set()
            held.wait(0.1)  # with a lock, the other one waits for us, too
        real(self, n_positions, dtype)

    def large() -> None:
        began.wait()
        table.reserve(100, torch.float32)
        held.set()

    monkeypatch.setattr(RotaryEmbedding, "_grow", slow)
    assert together(lambda: table.reserve(5, torch.float32), large) == [None, None]
    assert table.reserved == 128


def test_tables_that_are_reserved_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reserved` asks the first one alone, which therefore grows last."""
    tables = RotaryEmbeddings([RopeConfig(), RopeConfig(theta=1e6)], 8)
    seen: list[int] = []
    real = RotaryEmbedding._grow

    def watched(self: RotaryEmbedding, *arguments: Any) -> None:
        seen.append(tables.reserved)
        real(self, *arguments)

    monkeypatch.setattr(RotaryEmbedding, "_grow", watched)
    tables.reserve(10, torch.float32)
    assert seen == [0, 0]


# --- one stream -------------------------------------------------------------------------------------------------------


class Slow(OneReader[int]):
    """Gives 0, 1, 2 … and waits in `_next` until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go, self.count, self.released = threading.Event(), threading.Event(), -1, 0

    def _next(self) -> int:
        self.inside.set()
        assert self.go.wait(10)
        self.count += 1
        return self.count

    def _let_go(self) -> None:
        self.released += 1


def test_a_second_reader_is_told_so_and_takes_nothing() -> None:
    slow = Slow()
    reader = threading.Thread(target=lambda: next(slow))
    reader.start()
    slow.inside.wait()
    with pytest.raises(FastKVError, match="another thread is reading this stream"):
        next(slow)
    slow.go.set()
    reader.join()
    assert next(slow) == 1


def test_closing_waits_for_nobody() -> None:
    """It may come from a signal handler, inside the very call that reads; that call then lets the memory go."""
    slow, got = Slow(), []
    reader = threading.Thread(target=lambda: got.append(next(slow)))
    reader.start()
    slow.inside.wait()
    slow.close()
    assert slow.released == 0  # the reader is at work in it
    slow.go.set()
    reader.join()
    assert (got, slow.released, list(slow)) == ([0], 1, [])


def test_two_threads_share_a_stream(tiny_llm: LLM) -> None:
    """Every token goes to one of them, in order; nothing is lost, and nothing raised but our own error."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = tiny_llm.generate([5, 6, 7], params).token_ids
    for each in (tiny_llm.stream([5, 6, 7], params), tiny_llm.stream([5, 6, 7], params)):

        def read(each: Any = each) -> list[Any]:
            found = []
            while True:
                try:
                    found.append(next(each))
                except StopIteration:
                    return found
                except FastKVError:
                    continue

        results = together(read, read)
        assert all(isinstance(result, list) for result in results), results
        assert each.output().token_ids == expected
        assert sum(map(len, results)) == 30


def test_two_threads_share_a_batch(tiny_llm: LLM) -> None:
    """A generator would say "generator already executing"."""
    prompts = [[5 + index, 6, 7] for index in range(8)]
    for _ in range(3):
        each = tiny_llm.generate_each(prompts, SamplingParams(max_tokens=3, ignore_eos=True), batch_size=2)
        results = together(lambda each=each: list(each), lambda each=each: list(each))
        refused = [result for result in results if isinstance(result, Exception)]
        assert all(isinstance(error, FastKVError) for error in refused)
        assert len(refused) < 2


def test_closing_from_another_thread_hands_the_memory_on(tiny_llm: LLM) -> None:
    for _ in range(5):
        stream = tiny_llm.stream([5, 6, 7], SamplingParams(max_tokens=60, ignore_eos=True))
        pieces, closed = together(lambda s=stream: list(s), lambda s=stream: s.close())
        assert closed is None
        assert len(pieces) <= 60
        assert stream._batch is None
    forgotten = tiny_llm.stream([5, 6, 7])
    next(forgotten)
    del forgotten
    gc.collect()


# --- one model --------------------------------------------------------------------------------------------------------


def test_requests_at_the_same_time_do_not_meet(tiny_folder: Path) -> None:
    """Each has its own memory; the model's tables grow while others look them up."""
    llm = LLM(tiny_folder, dtype="float32", device="cpu")
    prompts = [list(range(3, 3 + length)) for length in (20, 90, 40, 130)]
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    policies = [FullKV(), FastKV(min_tokens=8), FullKV(), FastKV(min_tokens=8)]
    alone = [llm.generate(p, params, policy).token_ids for p, policy in zip(prompts, policies, strict=True)]
    llm = LLM(tiny_folder, dtype="float32", device="cpu")

    def ask(prompt: list[int], policy: Any) -> list[list[int]]:
        return [llm.generate(prompt, params, policy).token_ids for _ in range(3)]

    works = [lambda p=p, policy=policy: ask(p, policy) for p, policy in zip(prompts, policies, strict=True)]
    assert together(*works) == [[ids] * 3 for ids in alone]


def test_a_collection_inside_the_pool_may_give_back(tiny_llm: LLM) -> None:
    """The iterator of a batch that nobody holds is closed wherever Python collects, which takes the pool's lock."""
    pool = tiny_llm._runtime.buffers

    def give_back() -> None:
        with pool._lock:
            pool.give_back(pool.lease())

    assert together(give_back) == [None]


# --- forks ------------------------------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, torch
from fastkv import LLM, FastKVError, SamplingParams
torch.set_num_threads(2)
llm = LLM(sys.argv[1], device="cpu", dtype="float32")
ids = list(range(3, 203))
cache = llm.prefill(ids).cache
expected = llm.generate(ids, SamplingParams(max_tokens=2)).token_ids
if os.fork() == 0:
    signal.alarm(30)
    acts = [
        lambda: llm.generate(ids),
        lambda: llm.generate([ids]),
        lambda: llm.prefill(ids),
        lambda: llm.decode(cache, torch.tensor([3])),
        lambda: LLM(sys.argv[1], device="cpu"),
    ]
    for act in acts:
        try:
            act()
        except FastKVError as error:
            print(error)
    torch.set_num_threads(1)
    print(llm.generate(ids, SamplingParams(max_tokens=2)).token_ids == expected, flush=True)
    os._exit(0)
print(os.wait()[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_to_load_its_own_model(tiny_folder: Path) -> None:
    """In place of waiting for ever for threads that a fork does not take along. One thread needs no others."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tiny_folder)]
    two = {**os.environ, "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=two, check=True)
    *refused, alone, status = ended.stdout.splitlines()
    assert (len(refused), alone, status) == (5, "True", "0")
    for line in refused:
        assert "has used its threads for a model, and a fork takes none along; start processes by multip" in line


def test_a_model_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getpid()
    check_process(here, CPU, 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    check_process(here + 1, CPU)
    for device, threads in ((CPU, 2), (torch.device("cuda", 0), None)):
        with pytest.raises(FastKVError, match=f"process {here + 1} has"):
            check_process(here + 1, device, threads)
    monkeypatch.setattr(process, "_first", None)
    assert process_for_model(CPU) == here
    assert process._first is None  # a model that could not be loaded has used nothing
    process.has_model()
    assert process._first == here
