"""LongBench's datasets (arXiv 2308.14508): which metric each one has, and how its answers and prompts are treated."""

from __future__ import annotations

from fastkv.eval.longbench_metrics import (
    Metric,
    classification_score,
    code_sim_score,
    count_score,
    qa_f1_score,
    qa_f1_zh_score,
    retrieval_score,
    retrieval_zh_score,
    rouge_score,
    rouge_zh_score,
)

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
# Their prompts show worked examples, and a model goes on with another one: only the answer's first line counts.
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
# Prompts that a text completes, so no chat template is put around them.
WITHOUT_CHAT = FIRST_LINE | {"lcc", "repobench-p"}


def longbench_score(dataset: str, prediction: str, answers: tuple[str, ...], classes: tuple[str, ...] = ()) -> float:
    """The score of the answer that fits best. `classes`: of a dataset of classification.

    Raises FastKVError where the metric needs a package that is not installed.
    """
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n", 1)[0]
    return max(METRICS[dataset](prediction, answer, classes) for answer in answers)
