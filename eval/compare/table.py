"""The comparison as Markdown: for each task and retention a row for each policy, and its scores length by length.

What was kept is counted in the records, not from what the settings promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from fastkv.console.markdown import markdown
from fastkv.eval import table as shared
from fastkv.eval.compare.settings import FLOOR, wanted
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate, paired_estimate

MIB = 2**20

TITLES = {"kept": "{:g} % of the KV cache", "read": "{:g} % of the KV cache read in a step"}
NOTE = """\
Scores in %, differences to full in points over the same examples, with 95 % confidence intervals. First token and
decode: medians; × full: how many times as fast as the full cache on the same example, the median. KV: what the kept
entries of a prompt take, the mean; allocated: the cache with room for the answer, in whole blocks of slots. Read a
step: K, V and what chooses among them, in all layers, the mean."""


def render(
    records: Sequence[Record],
    specs: Sequence[PolicySpec],
    entry_bytes: int,
    left_out: Sequence[str] = (),
    by: str = "kept",
) -> str:
    """All tables with their notes.

    specs: the full cache first. entry_bytes: of one token's K and V in a KV head. left_out: who takes no part. by: what
    is equal, "kept" or "read".
    """
    answers = shared.answered_by_all(records, [spec.label for spec in specs])
    if not answers:
        return shared.NO_ANSWERS
    full, after = specs[0], shared.question_came_after(answers)
    parts = [shared.AFTER_TITLE] if after else []
    for task, of_task in shared.grouped(answers, "task").items():
        for retention in retentions_of(specs):
            compared = [spec for spec in specs if spec.retention in (None, retention)]
            count = f"{len(of_task)} example{'s' * (len(of_task) != 1)}"
            title = f"### {task}, {TITLES[by].format(100 * retention)}: {count}"
            note = _kept_note if by == "kept" else _read_note
            told = _reads_are_told(compared, of_task)
            header = [*_SCORES, *(_CONTEXT if after else []), *_COSTS, *(_READS if told else [])]
            lines = [_row(spec, full, of_task, entry_bytes) for spec in compared]
            read = [[_read_cell(spec, of_task)] if told else [] for spec in compared]
            rows = markdown(header, [[*line, *cell] for line, cell in zip(lines, read, strict=True)])
            parts += [title, rows + note(of_task, compared, retention), _by_length(compared, of_task)]
    settings = ", ".join(f"`{spec.label}`" for spec in specs)
    policies = f"The policies, with all that is not their default: {settings}."
    parts += [f"{NOTE}\n{shared.AFTER_NOTE}" if after else NOTE, policies, *left_out]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def retentions_of(specs: Sequence[PolicySpec]) -> list[float]:
    """The retentions compared, each once."""
    return list(dict.fromkeys(spec.retention for spec in specs if spec.retention is not None))


_SCORES = ["policy", "score", "− full"]
_CONTEXT = ["context, s", "× full"]  # where questions came later
_COSTS = ["first token, s", "× full", "decode, tokens/s", "× full", "KV kept", "KV, MiB", "allocated, MiB"]

_READS = ["read a step, MiB"]  # where that is known of every answer


def _reads_are_told(specs: Sequence[PolicySpec], answers: shared.Answers) -> bool:
    """Whether all of these records say what a step has read; older files and answers of one token do not."""
    return all(example[spec.label].read_bytes is not None for example in answers for spec in specs)


def _read_cell(spec: PolicySpec, answers: shared.Answers) -> str:
    """What a step has read of K, V and an index, in all layers: the mean over the examples."""
    return f"{fmean(example[spec.label].read_bytes or 0 for example in answers) / MIB:.3f}"


def _row(spec: PolicySpec, full: PolicySpec, answers: shared.Answers, entry_bytes: int) -> list[str]:
    records, scores = shared.records_of(answers, spec.label), shared.scores_of(answers, spec.label)
    gap = "" if spec is full else shared.points(paired_estimate(scores, shared.scores_of(answers, full.label)))
    first, decode = shared.cost_cells(records)
    context = shared.context_cells(records)
    return [
        spec.title,
        shared.percent(mean_estimate(scores)),
        gap,
        *context,
        *([_context_gain(spec, full, answers)] if context else []),
        first,
        _first_token_gain(spec, full, answers),
        decode,
        _decode_gain(spec, full, answers),
        f"{100 * shared.kept_share(records):.2f} %",
        f"{fmean(record.kv_entries for record in records) * entry_bytes / MIB:.3f}" if spec.kv_dtype is None else "–",
        f"{fmean(record.kv_bytes for record in records) / MIB:.3f}",
    ]


def _first_token_gain(spec: PolicySpec, full: PolicySpec, answers: shared.Answers) -> str:
    """How many times as fast as the full cache the first token came, example by example; the median."""
    return f"{median(example[full.label].ttft_s / example[spec.label].ttft_s for example in answers):.2f}"


def _context_gain(spec: PolicySpec, full: PolicySpec, answers: shared.Answers) -> str:
    """How many times as fast as under the full cache a context was read, where the question came later."""
    times = [(one[spec.label].context_s, one[full.label].context_s) for one in answers]
    return f"{median(theirs / ours for ours, theirs in times if ours is not None and theirs is not None):.2f}"


def _decode_gain(spec: PolicySpec, full: PolicySpec, answers: shared.Answers) -> str:
    """The same for decoding, where both answers had more than one token."""
    speeds = [(one[spec.label].decode_tokens_per_s, one[full.label].decode_tokens_per_s) for one in answers]
    gains = [ours / theirs for ours, theirs in speeds if ours is not None and theirs is not None]
    return f"{median(gains):.2f}" if gains else "–"


def _by_length(specs: Sequence[PolicySpec], answers: shared.Answers) -> str:
    """Score, then gain to the first token, at each length. Nothing where there is but one length."""
    full, lengths = specs[0], dict(sorted(shared.grouped(answers, "length").items()))
    if len(lengths) == 1:
        return ""

    def table(title: str, cell: Callable[[PolicySpec, shared.Answers], str]) -> str:
        rows = [[spec.title, *(cell(spec, part) for part in lengths.values())] for spec in specs]
        return markdown([title, *(f"{length:,} tokens" for length in lengths)], rows)

    scores = table("score", lambda spec, part: shared.percent(mean_estimate(shared.scores_of(part, spec.label))))
    gains = table("first token, × full", lambda spec, part: _first_token_gain(spec, full, part))
    if shared.question_came_after(answers):
        gains = f"{table('context, × full', lambda spec, part: _context_gain(spec, full, part))}\n{gains}"
    return f"{scores}\n{gains}"


def _kept_note(answers: shared.Answers, specs: Sequence[PolicySpec], retention: float) -> str:
    """Whether every policy kept what was wanted of every prompt, and by how much each of the others missed it."""
    missed = []
    for spec in specs[1:]:
        records = shared.records_of(answers, spec.label)
        off = [record.kv_entries / _wanted_entries(record, retention) - 1 for record in records]
        missed += [f"{spec.title} {_off_text(off)}"] if any(off) else []
    after = shared.question_came_after(answers)
    of = "context of N tokens, and all of the question," if after else "prompt of N tokens"
    same = f"int({retention:g} · N) entries of a {of} for each layer and KV head, in the mean"
    others = f"; against that, in the mean and of single prompts: {', '.join(missed)}" if missed else ""
    which = "every policy but full" if not missed else "every policy but full and those named here"
    return f"\nCounted in every prompt: {which} kept {same} ({FLOOR} at least){others}.\n"


def _read_note(answers: shared.Answers, specs: Sequence[PolicySpec], share: float) -> str:
    """How far from what was wanted the steps of each policy have read, against the full cache's on the same example."""
    lines, full = [], specs[0].label
    for spec in specs[1:]:
        pairs = [(one[spec.label].read_bytes, one[full].read_bytes) for one in answers]
        off = [ours / theirs / share - 1 for ours, theirs in pairs if ours is not None and theirs]
        lines += [f"{spec.title} {_off_text(off)}"] if off else []
    wanted_share = f"{100 * share:g} % of what those of the full cache read"
    counted = f"against that, in the mean and of single examples: {', '.join(lines)}" if lines else "not counted"
    return f"\nWhat the steps of an answer were to read, what chooses included: {wanted_share}; {counted}.\n"


def _off_text(off: Sequence[float]) -> str:
    """Shares as "mean (least to most)", in %."""
    mean, low, high = (f"{100 * share:+.2f} %".replace("-", "−") for share in (fmean(off), min(off), max(off)))
    return f"{mean} ({low} to {high})"


def _wanted_entries(record: Record, retention: float) -> int:
    """What a policy was to keep of a prompt, in all layers and heads."""
    chosen_from = record.prompt_tokens if record.context_tokens is None else record.context_tokens
    count = wanted(retention, chosen_from) + record.prompt_tokens - chosen_from
    return record.kv_full_entries // record.prompt_tokens * count
