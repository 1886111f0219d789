"""The results as Markdown: for each policy its scores overall and turn by turn, and what each policy cost.

Only texts of which every policy has answered every question count. The questions about one text are no independent
samples: an overall score is the mean over texts of their own means, and so are its interval and differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fastkv.console.markdown import markdown
from fastkv.eval import table as shared
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate, paired_estimate
from fastkv.eval.turns.runner import TURNS

Text = dict[str, list[Record]]  # of each policy the answers about one text, turn by turn

TITLES = {
    TURNS: "One conversation about each text: the right answers stand in it, whatever the model said.",
    "requests": "Every question was put to the text alone, as the policy left it in the cache.",
}
NOTE = (
    "Scores in %, differences to {first} in points over the same texts, both with 95 % confidence intervals. "
    "All turns: the questions about a text count together, as one sample."
)
COST_NOTE = (
    "Medians. Context: the time to read a text; the first token counts from the question on. "
    "KV kept: entries of all that stands before an answer, questions included."
)
NO_TEXTS = "No text has been finished by every policy yet.\n"


def render(records: Sequence[Record], labels: Sequence[str], questions: int, mode: str) -> str:
    """All tables with their notes. labels: the policies, the baseline first."""
    texts = finished(records, labels, questions)
    if not texts:
        return NO_TEXTS
    parts = [TITLES[mode]]
    for label in labels:
        gap = [] if label == labels[0] else [f"− {labels[0]}"]
        header = ["task", "tokens", "texts", "all turns", *gap, *(f"turn {k + 1}" for k in range(questions))]
        parts.append(f"### {label}\n\n{markdown(header, _rows(texts, label, labels[0]))}")
    costs = [_cost_row(label, [record for text in texts for record in text[label]]) for label in labels]
    parts += [NOTE.format(first=labels[0]), f"{markdown(_COSTS, costs)}\n{COST_NOTE}"]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def finished(records: Sequence[Record], labels: Sequence[str], questions: int) -> list[Text]:
    """The texts whose questions every policy has answered, in the order in which they came."""
    texts: dict[str, Text] = {}
    for record in records:
        texts.setdefault(record.id.rpartition("/")[0], {}).setdefault(record.policy, []).append(record)
    for text in texts.values():
        for answers in text.values():
            answers.sort(key=lambda record: record.turn or 0)
    return [text for text in texts.values() if all(len(text.get(label, ())) == questions for label in labels)]


def _rows(texts: Sequence[Text], label: str, first: str) -> list[list[str]]:
    """A row for each task and length, one for each task over its lengths, and one over all tasks."""
    rows, tasks = list[list[str]](), _grouped(texts, "task")
    for task, of_task in tasks.items():
        lengths = _grouped(of_task, "length")
        for length, part in sorted(lengths.items()):
            rows.append([str(task), f"{length:,}", *_cells(part, label, first)])
        if len(lengths) > 1:
            rows.append([str(task), "all", *_cells(of_task, label, first)])
    if len(tasks) > 1:
        rows.append(["all", "all", *_cells(texts, label, first)])
    return rows


def _cells(texts: Sequence[Text], label: str, first: str) -> list[str]:
    """The number of texts, the overall score, the difference to the first policy, and the score of each turn."""
    means, base = _means(texts, label), _means(texts, first)
    gap = [] if label == first else [shared.points(paired_estimate(means, base))]
    turns = zip(*([record.score for record in text[label]] for text in texts), strict=True)
    by_turn = [shared.percent(mean_estimate(scores)) for scores in turns]
    return [str(len(texts)), shared.percent(mean_estimate(means)), *gap, *by_turn]


def _means(texts: Sequence[Text], label: str) -> list[float]:
    """The mean over its turns, of each text."""
    return [fmean(record.score for record in text[label]) for text in texts]


def _grouped(texts: Sequence[Text], field: str) -> dict[str | int, list[Text]]:
    groups: dict[str | int, list[Text]] = {}
    for text in texts:
        groups.setdefault(getattr(next(iter(text.values()))[0], field), []).append(text)
    return groups


_COSTS = ["policy", "context, s", "first token, s", "decode, tokens/s", "KV kept"]


def _cost_row(label: str, records: Sequence[Record]) -> list[str]:
    times = [*shared.context_cells(records), *shared.cost_cells(records)]
    return [label, *times, f"{100 * shared.kept_share(records):.1f} %"]
