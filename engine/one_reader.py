"""Iterators that one thread reads at a time: a second one is told so, in place of tokens that belong to nobody."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import TypeVar

from fastkv.errors import FastKVError

T_co = TypeVar("T_co", covariant=True)


class OneReader(Iterator[T_co]):
    """An iterator that can be closed from anywhere: by its reader, by another thread, in a signal handler.

    Raises FastKVError where two threads ask for the next item at the same moment; one of them gets it.
    """

    def __init__(self) -> None:
        self._reading = threading.Lock()
        self._ended = False

    def __next__(self) -> T_co:
        if self._ended:
            raise StopIteration
        if not self._reading.acquire(blocking=False):
            raise FastKVError("another thread is reading this stream at the moment; let one thread read it")
        try:
            return self._next()
        finally:
            self._reading.release()
            if self._ended:
                self.close()

    def close(self) -> None:
        """End it early, and hand its memory on: at once, or when the item that a thread is waiting for is there."""
        self._ended = True
        # Never waits: the reader may be what this call has interrupted. If it is at work, it looks once it is done.
        if self._reading.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._reading.release()

    @abstractmethod
    def _next(self) -> T_co:
        """The next item. `_ended` is set with the last one, or StopIteration raised after it."""

    @abstractmethod
    def _let_go(self) -> None:
        """Hand the memory on, if that has not happened yet."""
