"""Numbers of things, in words for people."""

from __future__ import annotations


def counted(count: int, one: str, more: str | None = None) -> str:
    """`1 token`, `2 tokens`, `1,000 tokens`. more: the word for several, where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"
