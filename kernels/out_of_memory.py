"""What running out of memory looks like: each library says it in its own way. Imports no torch, as limits.py.

Python raises MemoryError, the system ENOMEM, torch a RuntimeError, the loader of libraries an ImportError, and others
an error of their own, in words that all mean the same.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fastkv.errors import FastKVError
from fastkv.kernels.limits import address_space_left

_WORDS = re.compile(
    r"(can't|cannot|could not|unable to|failed to) allocate"  # torch, the system, Rust
    r"|not enough memory|out of memory|bad_alloc|memory allocation"
    r"|failed to map segment"  # of a library
    r"|os error 12\b",  # Rust's ENOMEM
    re.IGNORECASE,
)
# With so little address space left, whatever fails has most likely failed for that: libraries that were refused memory
# say all kinds of things then (oneDNN "could not create a primitive", Python "error return without exception set").
_NOTHING_LEFT = 48 << 20


@dataclass(frozen=True)
class Work:
    """What memory is taken for: in words, and what helps if there is too little."""

    name: str
    advice: str


LOADING = Work("loading the model", "take a smaller model, --dtype bfloat16 or --weights int8, or raise the limit")
REQUEST = Work("the request", "take a shorter prompt, a lower kv_retention or fewer max_tokens")
COMMAND = Work("the command", "raise the limit (ulimit -v), or free memory for it")


def is_out_of_memory(error: BaseException, handled: BaseException | None = None) -> bool:
    """Whether an error means that there was too little memory: itself, or one that it was raised for.

    A FastKVError never does by itself: its words are ours. handled: what was being handled when the work began, and
    has nothing to do with it.
    """
    if any(map(_says_so, _chain(error, handled))):
        return True
    left = address_space_left()
    return left is not None and left < _NOTHING_LEFT and not isinstance(error, FastKVError)


def told(error: BaseException, work: Work) -> str:
    """One line: what failed, how it was said, and what helps."""
    says = next(filter(_says_so, _chain(error, None)), error)
    words = next((line.strip() for line in str(says).splitlines() if line.strip()), "")
    said = f" ({words.rstrip('.')})" if words else ""
    return f"out of memory for {work.name}{said}; {work.advice}"


def _says_so(error: BaseException) -> bool:
    if isinstance(error, FastKVError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # Python's own, and torch's
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(_WORDS.search(line) for line in str(error).splitlines()[:1])


def _chain(error: BaseException, end: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised for, however it hides them, up to `end`, which is none of them."""
    known = {id(end)}
    each: BaseException | None = error
    while each is not None and id(each) not in known:
        known.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
