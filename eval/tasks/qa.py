"""Questions over distractors (RULER's QA, arXiv 2404.06654): a question, its passage, and the passages of others.

The questions are the user's, one JSON object a line (SQuAD and HotpotQA are easily brought into this form):

    {"question": "Who …?", "answers": ["Ada Lovelace", "Lovelace"], "context": "The passage that tells."}

`answers` (or `answer`) is a string or a list of strings, any of which is right; `context` (or `paragraph`) is a string
or a list of strings, all of which are put among the distractors, in a place that chance chooses. As in RULER an answer
has 32 tokens; unlike there, the last passage may be cut at the end of a sentence so that the length comes out.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv.console.jsonl import read_objects
from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example, Task, contains_any
from fastkv.eval.fitting import fit

INTRO = (
    "Answer the question that follows these passages, in as few words as possible. One of them tells the answer.\n\n"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Question:
    question: str
    answers: tuple[str, ...]
    context: tuple[str, ...]


def qa_task(path: Path) -> Task:
    """The task of a file of questions. Raises FastKVError for a file that cannot be read as one."""
    lines, source = read_objects(path, "qa_file", "question, answers and context")
    questions = [_read(where, value) for where, value in lines]
    return Task(
        "qa",
        "questions of --qa-file over distractors",
        contains_any,
        32,
        lambda draw: write(draw, questions),
        source=source,
        most=len(questions),
    )


def write(draw: Draw, questions: list[Question]) -> Example:
    """Question `index` of an order that the seed shuffles; its distractors are other questions' passages."""
    order = random.Random(f"{draw.seed}/questions")
    asked = order.sample(questions, len(questions))[draw.slot.index]
    rng = draw.rng()
    others = sorted({passage for other in questions for passage in other.context} - set(asked.context))
    rng.shuffle(others)
    distractors = [_SENTENCE_END.split(passage) for passage in others]
    places = [rng.random() for _ in asked.context]
    tail = f"Question: {asked.question}"

    def build(n: int) -> Example:
        passages = _first_sentences(distractors, n)
        for place, passage in zip(places, asked.context, strict=True):
            passages.insert(int(place * (len(passages) + 1)), passage)
        listed = "\n\n".join(f"Passage {i}: {passage}" for i, passage in enumerate(passages, start=1))
        return Example(f"{INTRO}{listed}\n\n{tail}", asked.answers, "\nAnswer:", question=tail)

    return fit(draw, build, most=sum(map(len, distractors)))


def _first_sentences(passages: list[list[str]], n: int) -> list[str]:
    """Whole passages, and the beginning of one, that have n sentences together."""
    taken: list[str] = []
    for sentences in passages:
        if n <= 0:
            break
        taken.append(" ".join(sentences[:n]))
        n -= len(sentences)
    return taken


def _read(where: str, value: dict[str, Any]) -> Question:
    question = _texts(where, value, "question")
    if len(question) != 1:
        raise FastKVError(f"{where}: question must be one string", setting="qa_file")
    return Question(
        question[0], _texts(where, value, "answers", "answer"), _texts(where, value, "context", "paragraph")
    )


def _texts(where: str, value: dict[str, Any], *names: str) -> tuple[str, ...]:
    """The string or strings under the first of `names` that is there."""
    found = next((value[name] for name in names if name in value), None)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise FastKVError(f"{where}: {' or '.join(names)} must be a string or a list of strings", setting="qa_file")
    return tuple(text.strip() for text in texts)
