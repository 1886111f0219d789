"""Messages: one line of bounded length, printable anywhere, whatever they quote."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

from fastkv.errors import FastKVError, brief, check_choice, check_integer, check_number, cut, writable


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Watched(str):
    """A text that tells how much of it was written as a repr."""

    longest = 0

    def __getitem__(self, part: Any) -> str:
        return str.__getitem__(self, part)

    def __repr__(self) -> str:
        raise AssertionError("all of it was written")


HUGE = ["x" * 10**7, b"x" * 10**7, [1] * 10**6, (1,) * 10**6, 10**5000, Broken(), [10**5000], {"a": "x" * 10**6}]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: type(value).__name__)
def test_a_value_is_quoted_briefly(value: object) -> None:
    assert len(brief(value)) <= 200
    assert len(brief(value, 20)) <= 20


def test_small_values_are_quoted_whole() -> None:
    assert [brief(value) for value in ("a'b", 3, None, [1, "x"])] == ['"a\'b"', "3", "None", "[1, 'x']"]
    assert brief("x" * 198) == repr("x" * 198)


def test_beginning_and_end_of_a_long_value_are_shown() -> None:
    assert brief("a" * 1000 + "z" * 1000, 40) == "'" + "a" * 28 + "…" + "z" * 9 + "'"
    assert cut("abcdefghij", 8) == "abcde…ij"
    assert cut("abcdefgh", 8) == "abcdefgh"


def test_what_is_cut_is_not_written_first() -> None:
    assert brief(Watched("x" * 10**6)).startswith("'xxx")


def test_the_bytes_of_a_name_are_escaped() -> None:
    assert writable(os.fsdecode(b"caf\xe9 caf\xc3\xa9") + "\ud801") == "caf\\xe9 café\\ud801"


def test_a_message_is_one_short_printable_line() -> None:
    message = str(FastKVError(os.fsdecode(b"caf\xe9") + "\n\x1b[0m" + "x" * 10**7 + " the way out"))
    assert message.startswith("caf\\xe9  [0mxxx")
    assert message.endswith("xxx the way out")
    assert message.isprintable()
    assert len(message) <= 2010
    message.encode("utf-8")


@pytest.mark.parametrize("value", [*HUGE, None, math.nan, object, 2**63, -(10**5000)], ids=lambda v: type(v).__name__)
def test_every_check_ends_in_our_own_error(value: Any) -> None:
    checks = [
        lambda: check_integer("n", value, 0),
        lambda: check_integer("n", value, 0, 10),
        lambda: check_number("x", value, 0, 1),
        lambda: check_choice("c", value, ["a", "b"]),
    ]
    for check in checks:
        with pytest.raises(FastKVError) as refused:
            check()
        assert len(str(refused.value)) < 300


def test_integers_beyond_64_bits_are_refused() -> None:
    """Whatever follows would compute or write them: 64 bits are more than any setting means."""
    check_integer("n", 2**63 - 1, 0)
    with pytest.raises(FastKVError, match="at most 9223372036854775807, not 9223372036854775808"):
        check_integer("n", 2**63, 0)


def test_arrays_are_no_choice() -> None:
    """Comparing one with a name gives an array, which is neither true nor false."""
    numpy = pytest.importorskip("numpy")
    with pytest.raises(FastKVError, match="c must be one of a, b, not array"):
        check_choice("c", numpy.array(["a", "b"]), ["a", "b"])
