"""What is asked: a text with several questions about it, and a family of such texts. Knows no model and no policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastkv.eval.example import Draw, Example


@dataclass(frozen=True)
class Turn:
    """One question, and what it takes to go on after it.

    asked: the question as it follows on what stands before, the beginning of its answer, and the answers expected.
    golden: a right answer as it follows on that, which SCBench puts into the conversation, whatever the model said.
    score: of a prediction, in [0, 1]. max_new_tokens: of an answer.
    """

    asked: Example
    golden: str
    score: Callable[[str, Example], float]
    max_new_tokens: int


@dataclass(frozen=True)
class Talk(Example):
    """A text, `prompt`, and the questions about it in their order. It has no answers of its own."""

    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Family:
    """write: a text for a slot, never longer than its length, with so many different questions."""

    name: str
    summary: str
    write: Callable[[Draw, int], Talk]
