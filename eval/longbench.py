"""LongBench (arXiv 2308.14508): its metrics, by its own names, and which one each dataset has.

A metric takes one prediction and one answer and gives a score in [0, 1]. ROUGE-L is that of the package `rouge`, and
similarity that of `rapidfuzz`, both of the extra `eval`; Chinese is cut into words by `jieba`, if that is installed.
Knows no files and no models.
"""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastkv.errors import FastKVError
from fastkv.eval.example import Example

Metric = Callable[[str, str, tuple[str, ...]], float]  # prediction, answer, all classes of the dataset

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# First and last code point of each run that LongBench leaves out of Chinese words; 《 and ． are not among them.
_WIDE_RUNS = (
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011)),
    *((0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F)),
    *((0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
)
_WIDE_PUNCTUATION = dict.fromkeys(code for first, last in _WIDE_RUNS for code in range(first, last + 1))


def qa_f1_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """F1 of the words, each counted as often as it comes; case, punctuation, articles and spaces do not count."""
    return f1_score(_words(prediction), _words(answer))


def qa_f1_zh_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """F1 of the words that jieba finds; case, punctuation and spaces do not count."""
    return f1_score(_chinese_words(prediction), _chinese_words(answer))


def f1_score(prediction: list[str], answer: list[str]) -> float:
    """The harmonic mean of precision and recall of two bags of words; 0 where they share none."""
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def rouge_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """ROUGE-L's F of the package `rouge`, which ends sentences at full stops and counts a repeated word once.

    A text without a word gets 0. The package goes as deep as two sentences have words: Python is allowed that depth
    here, where LongBench's script counts the error as 0.
    """
    rouge = _package("rouge").Rouge(metrics=["rouge-l"])
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(usual + len(prediction.split()) + len(answer.split()))
    try:
        scores = rouge.get_scores([prediction], [answer], avg=True)
    except ValueError:  # a text without a sentence
        return 0.0
    finally:
        sys.setrecursionlimit(usual)
    return float(scores["rouge-l"]["f"])


def rouge_zh_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """`rouge_score` of the words that jieba finds."""
    return rouge_score(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification_score(prediction: str, answer: str, classes: tuple[str, ...]) -> float:
    """1 / n where the prediction names n classes and the right one is among them, else 0.

    A class whose name is part of the right one's does not count as named by it.
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """The share of the prediction's numbers that are the answer; 0 where it has none."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """`count_score` for the number of the answer `Paragraph 12`."""
    return count_score(prediction, _number_behind("Paragraph ", answer))


def retrieval_zh_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """`count_score` for the number of the answer `段落12`."""
    return count_score(prediction, _number_behind("段落", answer))


def code_sim_score(prediction: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """How similar the first line that is no comment and no fence is to the answer, in whole hundredths.

    The ratio of `rapidfuzz`, as fuzzywuzzy gives it where python-Levenshtein is installed.
    """
    ratio = _package("rapidfuzz.fuzz").ratio
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(ratio(line, answer)) / 100


LONGBENCH = "longbench:"  # in front of a dataset's name: its task
METRICS: dict[str, Metric] = {
    "narrativeqa": qa_f1_score,
    "qasper": qa_f1_score,
    "multifieldqa_en": qa_f1_score,
    "multifieldqa_zh": qa_f1_zh_score,
    "hotpotqa": qa_f1_score,
    "2wikimqa": qa_f1_score,
    "musique": qa_f1_score,
    "dureader": rouge_zh_score,
    "gov_report": rouge_score,
    "qmsum": rouge_score,
    "multi_news": rouge_score,
    "vcsum": rouge_zh_score,
    "trec": classification_score,
    "triviaqa": qa_f1_score,
    "samsum": rouge_score,
    "lsht": classification_score,
    "passage_count": count_score,
    "passage_retrieval_en": retrieval_score,
    "passage_retrieval_zh": retrieval_zh_score,
    "lcc": code_sim_score,
    "repobench-p": code_sim_score,
}
# Their prompts show worked examples, and a model continues with another one: only the answer's first line counts.
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
# Prompts that a text completes, so no chat template is put around them.
WITHOUT_CHAT = FIRST_LINE | {"lcc", "repobench-p"}


def longbench_score(dataset: str, prediction: str, example: Example) -> float:
    """The score of the answer that fits best.

    Raises FastKVError where the metric needs a package that is not installed.
    """
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n", 1)[0]
    return max(METRICS[dataset](prediction, answer, example.classes) for answer in example.answers)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    bare = (word.lower().translate(_ASCII_PUNCTUATION).translate(_WIDE_PUNCTUATION) for word in _cut(text))
    return [word for word in ("".join(word.split()) for word in bare) if word]


def _number_behind(name: str, answer: str) -> str:
    found = re.search(re.escape(name) + r"(\d+)", answer)
    if found is None:
        raise FastKVError(f"the answer {answer[:60]!r} names no {name.strip()} by its number")
    return found[1]


def _cut(text: str) -> list[str]:
    jieba = _package("jieba")
    jieba.setLogLevel("ERROR")  # it reports the loading of its dictionary
    return list(jieba.cut(text))


def _package(module: str) -> Any:
    """An optional package, by the module that is wanted of it."""
    try:
        return import_module(module)
    except ImportError:
        name = module.split(".", 1)[0]
        install = name if name == "jieba" else '"fastkv[eval]"'
        message = f"its metric needs the package {name}: pip install {install}, or leave this dataset out"
        raise FastKVError(message) from None
