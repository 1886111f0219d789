"""Training examples: an archive text with several questions and answers, as token ids with a loss weight for each."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.eval.tasks.archive import Encode, compose
from fastkv.eval.tasks.archive_text import FOUR, Digits, question

BOS, EOS = 0, 1
ANSWER_ENDS = 3  # tokens of an answer beside its digits: `.`, `\n` and EOS
QUESTION_TOKENS = 10
QUESTION_SHARE = 36  # tokens of a text, besides as many as a code has, for each of its questions
ANSWER_WEIGHT, TEXT_WEIGHT = 1.0, 0.05
MAX_QUESTIONS = 8


@dataclass(frozen=True)
class Batch:
    """ids: int64 [B, T + 1]. weights: float32 [B, T + 1], of each token as something to predict; 0 is padding."""

    ids: Tensor
    weights: Tensor


def make_batch(
    rng: random.Random, encode: Encode, size: int, length: int, digits: Digits = FOUR, n_questions: int | None = None
) -> Batch:
    """`size` fresh examples with `length` tokens to read, and so `length` to predict, each."""
    examples = [make_example(rng, encode, length + 1, digits, n_questions) for _ in range(size)]
    return Batch(torch.tensor([ids for ids, _ in examples]), torch.tensor([weights for _, weights in examples]))


def make_example(
    rng: random.Random, encode: Encode, tokens: int, digits: Digits = FOUR, n_questions: int | None = None
) -> tuple[list[int], list[float]]:
    """Ids and loss weights of one text with its questions, padded to exactly `tokens`.

    `n_questions` None gives as many as fit well: with codes of four digits, one for every 40 tokens, up to 8.
    """
    longest = digits[1]
    wanted = n_questions or min(max(tokens // (QUESTION_SHARE + longest), 1), MAX_QUESTIONS)
    room = tokens - 2 - wanted * (QUESTION_TOKENS + longest + ANSWER_ENDS)
    archive = compose(rng, encode, room, digits=digits)
    ids = [BOS, *encode(archive.text + "\n")]
    weights = [TEXT_WEIGHT] * len(ids)
    for key in rng.sample(archive.askable, min(wanted, len(archive.askable))):
        asked = encode(question(key))
        answer = [*encode(f" {archive.codes[key]}.\n"), EOS]
        ids += asked + answer
        weights += [TEXT_WEIGHT] * len(asked) + [ANSWER_WEIGHT] * len(answer)
    padding = tokens - len(ids)
    return ids + [EOS] * padding, weights + [0.0] * padding
