"""Archive: one access code among many, in the wording that the bundled model of examples/archive was trained on."""

from __future__ import annotations

from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example, Task
from fastkv.eval.tasks.archive_compose import make_prompt, size
from fastkv.eval.tasks.archive_text import record

ATTEMPTS = 8


def write(draw: Draw) -> Example:
    """A prompt of the slot's length with the asked record at the slot's depth.

    make_prompt adds up the tokens of sentences. Where a tokenizer or a chat template makes another sum of the whole,
    it is asked for that much more or less.
    """
    length = room = draw.limit
    sentence = size(draw.encode, record(("calm", "owl"), "0123"))
    best: tuple[int, Example] | None = None
    for _ in range(ATTEMPTS):
        example = _compose(draw, room)
        tokens = draw.count(example)
        if tokens <= length and (best is None or tokens > best[0]):
            best = tokens, example
        if length - sentence < tokens <= length:
            break
        room += length - tokens
    if best is None:
        raise FastKVError(f"{length} tokens are too short for task archive", setting="length")
    return best[1]


def _compose(draw: Draw, tokens: int) -> Example:
    depth = 0.5 if draw.slot.depth is None else draw.slot.depth
    try:
        prompt = make_prompt(draw.encode, tokens, depth, f"{draw.seed}/{draw.slot.id}")
    except ValueError as error:
        message = f"{draw.limit} tokens are too short for task archive ({error})"
        raise FastKVError(message, setting="length") from None
    return Example(prompt.text, (prompt.code,))


TASKS = (
    Task("archive", "the bundled model's own: one access code among many", "first_word", 8, write, has_depth=True),
)
