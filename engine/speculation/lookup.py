"""Prompt lookup: what followed the last tokens when they stood in the text before (no paper; widely used).

The last three tokens are looked for, then two, then one; of several places the latest counts. What stood after it is
the draft: free of cost, and often right where an answer repeats its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 3  # tokens that are looked for


class Lookup:
    """The text of one sequence, growing. ids: its tokens so far."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # what stands before a place -> the place, the latest one
        self.add(ids)

    def add(self, ids: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        for token in ids:
            end = len(self._ids)
            for length in range(1, min(LONGEST, end) + 1):
                self._ends[tuple(self._ids[end - length :])] = end
            self._ids.append(token)

    def after(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none where the last token is a new one.

        A place that is near the end is followed by what is guessed itself: a repetition goes on.
        """
        for length in range(min(LONGEST, len(self._ids)), 0, -1):
            place = self._ends.get(tuple(self._ids[-length:]))
            if place is not None:
                period = len(self._ids) - place
                return [self._ids[place + index % period] for index in range(count)]
        return []
