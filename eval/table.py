"""The results as Markdown: scores for each task and length, differences to the first policy, and what each one cost.

Only examples that every policy has answered count, so that no policy looks better or worse for having seen other texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fastkv.eval.results import Record
from fastkv.eval.scoring import LONGBENCH
from fastkv.eval.statistics import Estimate, mean_estimate, mean_of_means, paired_estimate

Answers = dict[str, dict[str, Record]]  # example id -> policy label -> record

SCORES_NOTE = (
    "Scores in %, differences to {first} in points over the same examples, both with 95 % confidence intervals: "
    "Wilson's and Tango's where every score is 0 or 1, Student's t where not."
)
COST_NOTE = (
    "Medians over all examples. KV kept: entries of the prompt; KV bytes: allocated, room for the answer included."
)
NO_ANSWERS = "No example has been answered by every policy yet.\n"


def answered_by_all(records: Sequence[Record], labels: Sequence[str]) -> Answers:
    """The examples that every one of `labels` has a record for, in the order in which they came."""
    answers: Answers = {}
    for record in records:
        answers.setdefault(record.id, {})[record.policy] = record
    return {id_: by_policy for id_, by_policy in answers.items() if set(by_policy) == set(labels)}


def render(records: Sequence[Record], labels: Sequence[str]) -> str:
    """Both tables with their notes. `labels`: the policies, the baseline first."""
    answers = answered_by_all(records, labels)
    if not answers:
        return NO_ANSWERS
    scores = markdown(_score_header(labels), _score_rows(list(answers.values()), labels))
    costs = markdown(_COST_HEADER, [_cost_row(label, list(answers.values())) for label in labels])
    notes = SCORES_NOTE.format(first=labels[0]) + _cut_note(answers)
    return f"{scores}\n{notes}\n\n{costs}\n{COST_NOTE}\n"


def _cut_note(answers: Answers) -> str:
    """How many prompts with lengths of their own have lost their middle; nothing where there are none of these."""
    own = [next(iter(example.values())) for example in answers.values()]
    own = [record for record in own if record.length is None]
    cut = [record for record in own if record.cut]
    if not own:
        return ""
    tasks = dict.fromkeys(record.task.removeprefix(LONGBENCH) for record in cut)
    which = f" ({', '.join(f'{task} {_of(task, cut)} of {_of(task, own)}' for task in tasks)})" if cut else ""
    return f"\n{len(cut)} of {len(own)} LongBench prompts were too long and lost their middle{which}."


def _of(dataset: str, records: Sequence[Record]) -> int:
    return sum(record.task == LONGBENCH + dataset for record in records)


def _score_header(labels: Sequence[str]) -> list[str]:
    return ["task", "tokens", "examples", *labels, *(f"{label} − {labels[0]}" for label in labels[1:])]


def _score_rows(examples: list[dict[str, Record]], labels: Sequence[str]) -> list[list[str]]:
    """A row for each task and length, one for each task over its lengths, and one over all tasks.

    LongBench's own average counts each of its datasets the same, and has a row of its own.
    """
    tasks: dict[str, list[dict[str, Record]]] = {}
    for example in examples:
        tasks.setdefault(next(iter(example.values())).task, []).append(example)
    rows: list[list[str]] = []
    for task, of_task in tasks.items():
        lengths: dict[int | None, list[dict[str, Record]]] = {}
        for example in of_task:
            lengths.setdefault(next(iter(example.values())).length, []).append(example)
        for length, cell in sorted(lengths.items(), key=lambda item: item[0] or 0):
            rows.append([task, "own" if length is None else f"{length:,}", *_score_cells([cell], labels)])
        if len(lengths) > 1:
            rows.append([task, "all", *_score_cells([of_task], labels)])
    datasets = [of_task for task, of_task in tasks.items() if task.startswith(LONGBENCH)]
    if len(datasets) > 1:
        rows.append([f"longbench, mean of {len(datasets)}", "own", *_score_cells(datasets, labels)])
    if len(tasks) > max(len(datasets), 1):
        rows.append(["all", "all", *_score_cells([examples], labels)])
    return rows


def _score_cells(parts: Sequence[Sequence[dict[str, Record]]], labels: Sequence[str]) -> list[str]:
    """The number of examples, scores and differences. Every part counts the same, however many examples it has."""

    def scores(part: Sequence[dict[str, Record]], label: str) -> list[float]:
        return [example[label].score for example in part]

    means = [mean_of_means([mean_estimate(scores(part, label)) for part in parts]) for label in labels]
    differences = [
        mean_of_means([paired_estimate(scores(part, label), scores(part, labels[0])) for part in parts])
        for label in labels[1:]
    ]
    return [str(sum(map(len, parts))), *map(percent, means), *map(points, differences)]


_COST_HEADER = ["policy", "first token, s", "decode, tokens/s", "KV kept", "KV bytes"]


def _cost_row(label: str, examples: list[dict[str, Record]]) -> list[str]:
    records = [example[label] for example in examples]
    speeds = [record.decode_tokens_per_s for record in records if record.decode_tokens_per_s is not None]
    return [
        label,
        f"{median(record.ttft_s for record in records):.3f}",
        f"{median(speeds):,.1f}" if speeds else "–",
        f"{100 * kept_share(records):.1f} %",
        f"{100 * sum(r.kv_bytes for r in records) / sum(r.kv_full_bytes for r in records):.1f} %",
    ]


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


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what would end a cell is replaced."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |\n" for line in lines)
