"""Where the words of an answer stand in the prompt: the places that a reader wants to see kept.

Compares text with text. It does not know where the model looked, and says nothing of words that occur several times.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

MOST = 12  # places that are shown
_SHORTEST = 3  # characters: a lone "a" is no find

Word = tuple[str, int, int]  # casefolded, and where it begins and ends in its text


def echoes(answer: str, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Token ranges [first, end) of a prompt, whose tokens have these `texts`, that repeat words of `answer`.

    A place is the longest run of the answer's words that stands in the prompt, and only if it stands there once. At
    most MOST places, the longest runs, in the order of the prompt.
    """
    prompt = "".join(texts)
    words = _words(prompt)
    runs = {(first, end) for first, end in _runs(_words(answer), words) if _is_find(words[first:end])}
    longest = sorted(runs, key=lambda run: (run[0] - run[1], run))[:MOST]
    starts = list(accumulate(map(len, texts), initial=0))[:-1]
    return [_tokens(starts, words[first][1], words[end - 1][2]) for first, end in sorted(longest)]


def _words(text: str) -> list[Word]:
    return [(match.group().casefold(), *match.span()) for match in re.finditer(r"\w+", text)]


def _is_find(run: list[Word]) -> bool:
    return len(run) > 1 or len(run[0][0]) >= _SHORTEST


def _runs(answer: list[Word], prompt: list[Word]) -> list[tuple[int, int]]:
    """Ranges of the prompt's words: each the longest that the answer repeats, if there is only one such."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, (word, _, _) in enumerate(prompt):
        places[word].append(index)
    found: list[tuple[int, int]] = []
    at = 0
    while at < len(answer):
        starts, length = places.get(answer[at][0], []), 1
        while starts and at + length < len(answer):
            following = answer[at + length][0]
            longer = [s for s in starts if s + length < len(prompt) and prompt[s + length][0] == following]
            if not longer:
                break
            starts, length = longer, length + 1
        if len(starts) == 1:
            found.append((starts[0], starts[0] + length))
        at += length
    return found


def _tokens(starts: list[int], first: int, end: int) -> tuple[int, int]:
    """The tokens that hold characters [first, end) of the text; starts: where each token begins in it."""
    return bisect_right(starts, first) - 1, bisect_right(starts, end - 1)
