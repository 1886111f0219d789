"""The results as Markdown: scores for each task and length, differences to the first policy, and what each one cost.

Only examples that every policy has answered count, so that no policy looks better or worse for having seen other texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from fastkv.console.markdown import markdown
from fastkv.eval.longbench import LONGBENCH
from fastkv.eval.results import Record
from fastkv.eval.statistics import Estimate, mean_estimate, mean_of_means, paired_estimate

Answers = list[dict[str, Record]]  # of each example: policy label -> record

SCORES_NOTE = (
    "Scores in %, differences to {first} in points over the same examples, both with 95 % confidence intervals: "
    "Wilson's and Tango's where every score is 0 or 1, Student's t where not."
)
COST_NOTE = (
    "Medians over all examples. KV kept: entries of the prompt; KV bytes: allocated, room for the answer included."
)
AFTER_TITLE = "Question later: each policy read the text alone, then the question came and was kept whole."
AFTER_NOTE = "Context: the time to read it; the first token counts from the question on."
NO_ANSWERS = "No example has been answered by every policy yet.\n"


def answered_by_all(records: Sequence[Record], labels: Sequence[str]) -> Answers:
    """The examples that every one of `labels` has a record for, in the order in which they came."""
    answers: dict[str, dict[str, Record]] = {}
    for record in records:
        answers.setdefault(record.id, {})[record.policy] = record
    return [of_example for of_example in answers.values() if set(of_example) == set(labels)]


def grouped(answers: Answers, field: str) -> dict[Any, Answers]:
    """The examples by a field that the records of one example share, in the order in which its values came."""
    groups: dict[Any, Answers] = {}
    for example in answers:
        groups.setdefault(getattr(next(iter(example.values())), field), []).append(example)
    return groups


def records_of(answers: Answers, label: str) -> list[Record]:
    """One policy's."""
    return [example[label] for example in answers]


def scores_of(answers: Answers, label: str) -> list[float]:
    """One policy's."""
    return [example[label].score for example in answers]


def render(records: Sequence[Record], labels: Sequence[str]) -> str:
    """Both tables with their notes. `labels`: the policies, the baseline first."""
    answers = answered_by_all(records, labels)
    if not answers:
        return NO_ANSWERS
    after = question_came_after(answers)
    header = ["task", "tokens", "examples", *labels, *(f"{label} − {labels[0]}" for label in labels[1:])]
    scores = markdown(header, _score_rows(answers, labels))
    cost_header = [_COST_HEADER[0], *["context, s"] * after, *_COST_HEADER[1:]]
    costs = markdown(cost_header, [_cost_row(label, records_of(answers, label)) for label in labels])
    notes = SCORES_NOTE.format(first=labels[0]) + _cut_note(records_of(answers, labels[0]))
    title, note = (f"{AFTER_TITLE}\n\n", f"{COST_NOTE} {AFTER_NOTE}") if after else ("", COST_NOTE)
    return f"{title}{scores}\n{notes}\n\n{costs}\n{note}\n"


def question_came_after(answers: Answers) -> bool:
    """Whether the answers are those of a run where questions came after their contexts were read; all or none are."""
    return any(record.context_s is not None for example in answers for record in example.values())


def _cut_note(records: Sequence[Record]) -> str:
    """How many prompts with lengths of their own have lost their middle; nothing where there are none of these."""
    own = Counter(record.task for record in records if record.length is None)
    cut = Counter(record.task for record in records if record.length is None and record.cut)
    if not own:
        return ""
    parts = ", ".join(f"{task.removeprefix(LONGBENCH)} {count} of {own[task]}" for task, count in cut.items())
    which = f" ({parts})" if parts else ""
    return f"\n{cut.total()} of {own.total()} LongBench prompts were too long and lost their middle{which}."


def _score_rows(answers: Answers, labels: Sequence[str]) -> list[list[str]]:
    """A row for each task and length, one for each task over its lengths, and one over all tasks.

    LongBench's own average counts each of its datasets the same, and has a row of its own.
    """
    tasks = grouped(answers, "task")
    rows: list[list[str]] = []
    for task, of_task in tasks.items():
        lengths = grouped(of_task, "length")
        for length in sorted(lengths, key=lambda length: length or 0):
            rows.append([task, "own" if length is None else f"{length:,}", *_score_cells([lengths[length]], labels)])
        if len(lengths) > 1:
            rows.append([task, "all", *_score_cells([of_task], labels)])
    datasets = [of_task for task, of_task in tasks.items() if task.startswith(LONGBENCH)]
    if len(datasets) > 1:
        rows.append([f"longbench, mean of {len(datasets)}", "own", *_score_cells(datasets, labels)])
    if len(tasks) > max(len(datasets), 1):
        rows.append(["all", "all", *_score_cells([answers], labels)])
    return rows


def _score_cells(parts: Sequence[Answers], labels: Sequence[str]) -> list[str]:
    """The number of examples, scores and differences. Every part counts the same, however many examples it has."""
    means = [mean_of_means([mean_estimate(scores_of(part, label)) for part in parts]) for label in labels]
    differences = [
        mean_of_means([paired_estimate(scores_of(part, label), scores_of(part, labels[0])) for part in parts])
        for label in labels[1:]
    ]
    return [str(sum(map(len, parts))), *map(percent, means), *map(points, differences)]


_COST_HEADER = ["policy", "first token, s", "decode, tokens/s", "KV kept", "KV bytes"]


def _cost_row(label: str, records: Sequence[Record]) -> list[str]:
    allocated = sum(record.kv_bytes for record in records) / sum(record.kv_full_bytes for record in records)
    times = [*context_cells(records), *cost_cells(records)]
    return [label, *times, f"{100 * kept_share(records):.1f} %", f"{100 * allocated:.1f} %"]


def cost_cells(records: Sequence[Record]) -> list[str]:
    """Median time to the first token, in s, and median decoding speed, in tokens/s, as text."""
    speed = median_speed(records)
    return [f"{median_ttft(records):.3f}", f"{speed:,.1f}" if speed == speed else "–"]


def context_cells(records: Sequence[Record]) -> list[str]:
    """Median time to read a context, in s, where the questions came later; else nothing."""
    times = [record.context_s for record in records if record.context_s is not None]
    return [f"{median(times):.3f}"] if times else []


def median_ttft(records: Sequence[Record]) -> float:
    return median(record.ttft_s for record in records)


def median_speed(records: Sequence[Record]) -> float:
    """Tokens/s; NaN where every answer has but one token."""
    speeds = [record.decode_tokens_per_s for record in records if record.decode_tokens_per_s is not None]
    return median(speeds) if speeds else float("nan")


def kept_share(records: Sequence[Record]) -> float:
    """The share of the prompts' KV entries that was kept, over all of `records`."""
    return sum(record.kv_entries for record in records) / sum(record.kv_full_entries for record in records)


def percent(estimate: Estimate) -> str:
    """A share in %, with its interval."""
    mean, low, high = (f"{round(100 * share, 1) + 0.0:.1f}" for share in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} ({low} – {high})"  # + 0.0: rounding may leave a zero with a sign


def points(estimate: Estimate) -> str:
    """A difference of shares in points, with its interval."""
    return f"{_signed(estimate.mean)} ({_signed(estimate.low)} to {_signed(estimate.high)})"


def _signed(share: float) -> str:
    """Points with their sign, and none for what rounds to zero."""
    rounded = round(100 * share, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"
