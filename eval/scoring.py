"""How an answer is scored, in [0, 1]: by RULER's two string-match rules (arXiv 2404.06654), by its first word alone, or
by the metric of a LongBench dataset (longbench.py).
"""

from __future__ import annotations

from collections.abc import Callable

from fastkv.eval.example import Example
from fastkv.eval.longbench import longbench_score

LONGBENCH = "longbench:"  # in front of a dataset's name: the rule, and the task, of that dataset


def score(rule: str, prediction: str, example: Example) -> float:
    """The score of what a model says to `example`. rule: a name in RULES, or `longbench:` and a dataset."""
    if rule.startswith(LONGBENCH):
        return longbench_score(rule.removeprefix(LONGBENCH), prediction, example.answers, example.classes)
    return RULES[rule](prediction, example.answers)


def string_match_all(prediction: str, answers: tuple[str, ...]) -> float:
    """The share of the answers that the prediction contains, whatever the case."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: tuple[str, ...]) -> float:
    """1 if the prediction contains any of the answers, whatever the case."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def first_word(prediction: str, answers: tuple[str, ...]) -> float:
    """1 if the prediction's first word, without a full stop at its end, is one of the answers."""
    words = prediction.split(maxsplit=1)
    return float(bool(words) and words[0].removesuffix(".") in answers)


RULES: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "all": string_match_all,
    "part": string_match_part,
    "first_word": first_word,
}
