"""What may come of an example: success or one clear complaint. Everything else is a fault. Knows no generator."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NamedTuple

from fastkv.errors import FastKVError

SUCCESS, REFUSAL, UNDECIDED, FAULT = "successes", "refusals", "undecided", "faults"
KINDS = (SUCCESS, REFUSAL, UNDECIDED, FAULT)
LONGEST_MESSAGE = 10_000  # characters; a path alone may have four thousand


class Outcome(NamedTuple):
    """kind: of KINDS. what: of a fault, one line by which it is told from others. detail: its traceback or output."""

    kind: str
    what: str = ""
    detail: str = ""


class UndecidedError(Exception):
    """Raised by an example that tells nothing, such as a choice that only the rounding decides."""


class BrokenPromiseError(AssertionError):
    """Raised by an example that finds a promise broken. Its message says which one; detail: by what."""

    def __init__(self, promise: str, detail: object = "") -> None:
        super().__init__(promise)
        self.detail = detail


def require(held: bool, promise: str, detail: object = "") -> None:
    """Raise BrokenPromiseError unless it held."""
    if not held:
        raise BrokenPromiseError(promise, detail)


def check_complaint(message: str) -> None:
    """A complaint is one line that any terminal can show."""
    require(bool(message.strip()), "a complaint says something")
    require(message.isprintable(), "a complaint is one printable line", message)
    require(len(message) <= LONGEST_MESSAGE, "a complaint is not too long to read", message)


def outcome_of(work: Callable[[], None]) -> Outcome:
    """Do the work, and say what came of it. Nothing is raised."""
    try:
        work()
    except FastKVError as error:
        return _refused(error)
    except UndecidedError as error:
        return Outcome(UNDECIDED, str(error))
    except BaseException as error:  # a panic of a Rust library is no Exception
        return _fault(error)
    return Outcome(SUCCESS)


def _refused(error: FastKVError) -> Outcome:
    try:
        check_complaint(str(error))
    except BrokenPromiseError as broken:
        return _fault(broken)
    return Outcome(REFUSAL, str(error)[:200])


def _fault(error: BaseException) -> Outcome:
    """Told apart by the exception and by the last place in a file of the package that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fuzz/" not in frame.filename and "/site-packages/" not in frame.filename]
    ours = [frame for frame in ours if "/lib/python" not in frame.filename]
    place = f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].name}" if ours else "the test"
    said = (str(error).splitlines() or [""])[0]
    text = "".join(traceback.format_exception(error))
    detail = f"{text}{getattr(error, 'detail', '')!s:.2000}"
    return Outcome(FAULT, f"{type(error).__name__} in {place}: {said[:100]!a}", shortened(detail))


def shortened(text: str) -> str:
    """The last lines, and of each the beginning."""
    return "\n".join(f"{line:.300}" for line in text.splitlines()[-60:])
