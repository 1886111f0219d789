"""What an example is, and what a task is: a function that writes one, and a rule that scores predictions.

Knows no model and no policy. The rules here are RULER's two string matches (arXiv 2404.06654), and the first word.

A slot says which example is meant; seed and slot together fix its text. So the same command asks the same questions
again, and every policy of a run is asked the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Slot:
    """The place of an example in a run.

    `length` is in tokens, and None where texts have their own; `depth` in [0, 1] is None where the task draws it.
    """

    task: str
    length: int | None
    depth: float | None
    index: int

    @property
    def id(self) -> str:
        """Stable from run to run, and unique within one."""
        length = "" if self.length is None else f"/tokens={self.length}"
        depth = "" if self.depth is None else f"/depth={self.depth:g}"
        return f"{self.task}{length}{depth}/{self.index}"


@dataclass(frozen=True)
class Example:
    """The text of an example: what is asked, the beginning of the answer, and the answers expected after it.

    `lead` ends where the model's own words begin; under a chat template it is the beginning of the model's turn.
    chat: whether a chat template may be put around the prompt. classes: all that the answer could be, where it is a
    class. cut: whether the text had a middle that is left out here. question: the end of `prompt` that asks, without
    spaces around it, where it stands apart from what it asks about; "" where it does not.
    """

    prompt: str
    answers: tuple[str, ...]
    lead: str = ""
    chat: bool = True
    classes: tuple[str, ...] = ()
    cut: bool = False
    question: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.lead

    def after(self, text: str) -> Example:
        """The same with `text` in front."""
        return replace(self, prompt=text + self.prompt)


@dataclass(frozen=True)
class Draw:
    """All that a task may look at while it writes: the slot, the seed, and the model's tokenizer as two functions.

    count: tokens of a whole example, BOS and chat template included. encode: ids of a bare text, nothing added; decode:
    the text of such ids. room: the tokens that the model has for a text of its own length.
    """

    slot: Slot
    seed: int
    count: Callable[[Example], int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    room: int = 0

    @property
    def limit(self) -> int:
        """The tokens that the example may have."""
        return self.room if self.slot.length is None else self.slot.length

    def rng(self, *purpose: str | int) -> random.Random:
        """A fresh source of chance for this example; another purpose gives another one."""
        return random.Random("/".join(map(str, (self.seed, self.slot.id, *purpose))))


@dataclass(frozen=True)
class Task:
    """A family of examples.

    write: the text for a slot, never longer than its limit. score: of a prediction, in [0, 1]. has_depth,
    has_length: whether the run's depths and lengths apply to it. source: what the file it reads holds, as a checksum,
    where it reads one. most: how many examples there are, where they are not drawn without end.
    """

    name: str
    summary: str
    score: Callable[[str, Example], float]
    max_new_tokens: int
    write: Callable[[Draw], Example]
    has_depth: bool = False
    has_length: bool = True
    source: str | None = None
    most: int | None = None


def contains_all(prediction: str, example: Example) -> float:
    """The share of the answers that the prediction contains, whatever the case."""
    return sum(answer.lower() in prediction.lower() for answer in example.answers) / len(example.answers)


def contains_any(prediction: str, example: Example) -> float:
    """1 if the prediction contains any of the answers, whatever the case."""
    return float(any(answer.lower() in prediction.lower() for answer in example.answers))


def first_word(prediction: str, example: Example) -> float:
    """1 if the prediction's first word, without a full stop at its end, is one of the answers."""
    words = prediction.split(maxsplit=1)
    return float(bool(words) and words[0].removesuffix(".") in example.answers)
