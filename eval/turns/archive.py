"""Archive: several access codes of one text, in the wording that the bundled model was trained on. Not of SCBench."""

from __future__ import annotations

from functools import partial

from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example, first_word
from fastkv.eval.fitting import adjust
from fastkv.eval.tasks.archive import MAX_RECORDS, MAX_SHARE, MIN_SHARE, compose, record_size
from fastkv.eval.tasks.archive_text import FOUR, question
from fastkv.eval.turns.talk import Family, Talk, Turn

ANSWER = 8  # tokens
SPARE = 3  # records more than questions, at the least


def write(draw: Draw, questions: int) -> Talk:
    return adjust(draw, partial(_compose, draw, questions), draw.limit, record_size(draw.encode, FOUR))


def _compose(draw: Draw, questions: int, tokens: int) -> Talk:
    rng = draw.rng()
    try:
        share = rng.uniform(MIN_SHARE, MAX_SHARE)
        wanted = max(round(share * tokens / record_size(draw.encode, FOUR)), questions + SPARE)
        archive = compose(rng, draw.encode, tokens, min(wanted, MAX_RECORDS))
        if len(archive.askable) < questions:
            raise ValueError("too many of its codes appear twice; take another seed")
        keys = rng.sample(archive.askable, questions)
    except ValueError as error:
        message = f"{draw.limit} tokens are too short for {questions} questions of task {draw.slot.task} ({error})"
        raise FastKVError(message, setting="length") from None
    turns = [
        Turn(Example(f"\n{question(key)}", (code,)), f" {code}.", first_word, ANSWER)
        for key, code in ((key, archive.codes[key]) for key in keys)
    ]
    return Talk(archive.text, (), turns=tuple(turns))


FAMILY = Family("archive", "the bundled model's own: access codes among many", write)
