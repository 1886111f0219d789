"""Where a question begins among the token ids of a prompt. Ids are split, never texts: the prompt stays what it is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable


def question_start(ids: list[int], question: str, decode: Callable[[list[int]], str]) -> int | None:
    """The place in `ids` of the first token that holds a part of `question`, which comes last there; None: not found.

    A token that begins before the question and reaches into it counts as the question's. decode: the text of ids.
    """
    size = len(ids)

    def held_by_last(count: int) -> bool:
        return question in decode(ids[size - count :])

    count = bisect_left(range(size + 1), True, key=held_by_last) if question else size + 1
    return None if count > size else size - count
