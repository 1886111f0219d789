"""Ranks that are threads of one process: what processes do over gloo, without the seconds that starting them takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import Tensor

from fastkv import LLM
from fastkv.engine import loaded
from fastkv.kernels.ranks import Across, Ranks

T = TypeVar("T")
_own = threading.local()  # .ranks: those of this thread
_PATIENCE = 60  # seconds that a rank waits for the others


class Meeting:
    """Where threads wait for one another."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count)
        self._given: list[Any] = [None] * count

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What all ranks have given. Shapes and dtypes must agree, as those of processes must."""
        self._given[rank] = x
        self._barrier.wait(_PATIENCE)
        taken = [each.clone() for each in self._given]
        self._barrier.wait(_PATIENCE)
        assert all(each.shape == x.shape and each.dtype == x.dtype for each in taken), [each.shape for each in taken]
        return taken

    def leave(self) -> None:
        self._barrier.abort()


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.count, 1)
        self._meeting = meeting

    def gather(self, x: Tensor) -> Sequence[Tensor]:
        return self._meeting.exchange(self.rank, x)

    def sum_(self, x: Tensor) -> Tensor:
        first, *others = self.gather(x)
        for other in others:
            first += other
        return x.copy_(first)


class Shared:
    """An LLM that several ranks share, and what each of them does with its part."""

    def __init__(self, folder: Path | str, count: int = 2, **settings: Any) -> None:
        def load() -> LLM:
            return LLM(folder, device="cpu", tensor_parallel=count, **{"dtype": "float32", **settings})

        self.llms: list[LLM] = on_ranks(count, load)

    def run(self, work: Callable[[LLM], T]) -> list[T]:
        """What `work` gives on each rank."""

        def on_one() -> T:
            llm = self.llms[_own.ranks.rank]
            for module in llm.model.modules():
                if isinstance(module, Across):
                    module.ranks = _own.ranks  # an error in an earlier run has ended the meeting of that one
            return work(llm)

        return on_ranks(len(self.llms), on_one)


def on_ranks(count: int, work: Callable[[], T]) -> list[T]:
    """What `work` gives on each of `count` ranks. An error of one is raised here, and ends the others."""
    meeting, errors = Meeting(count), list[BaseException]()
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        _own.ranks = ThreadRanks(rank, meeting)
        try:
            results[rank] = work()
        except BaseException as error:
            errors.append(error)
            meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded, "ProcessRanks", _Started)
        patch.setattr(loaded, "check_started", lambda count: None)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((each for each in errors if not isinstance(each, threading.BrokenBarrierError)), errors[0])
    return results


def this_rank() -> Ranks:
    """Of the thread that asks."""
    return _own.ranks


class _Started:
    """In place of processes that torchrun has started."""

    @staticmethod
    def of_this_process(kind: str) -> Ranks:
        return _own.ranks
