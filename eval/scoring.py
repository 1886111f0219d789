"""How a prediction is scored, in [0, 1]: by RULER's two string-match rules (arXiv 2404.06654), or by its first word."""

from __future__ import annotations

from fastkv.eval.example import Example


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
