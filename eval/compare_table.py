"""The comparison as Markdown: for each task and retention a row for each policy, and its scores length by length.

What was kept is said from the records, not from what the settings promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from fastkv.eval.compare_settings import FLOOR, Entrant, wanted
from fastkv.eval.results import Record
from fastkv.eval.statistics import mean_estimate, paired_estimate
from fastkv.eval.table import NO_ANSWERS, answered_by_all, kept_share, markdown, percent, points

MIB = 2**20
Examples = list[dict[str, Record]]  # each: label -> record

NOTE = """\
Scores in %, differences to full in points over the same examples, with 95 % confidence intervals. First token and
decode: medians; × full: how many times as fast as the full cache on the same example, the median. KV: what the kept
entries of a prompt take, the mean; allocated: the cache with room for the answer, in whole blocks of slots."""


def render(
    records: Sequence[Record], entrants: Sequence[Entrant], entry_bytes: int, left_out: Sequence[str] = ()
) -> str:
    """All tables with their notes.

    entrants: the full cache first. entry_bytes: of one token's K and V in a KV head. left_out: who takes no part.
    """
    answers = answered_by_all(records, [entrant.label for entrant in entrants])
    if not answers:
        return NO_ANSWERS
    full, parts = entrants[0], []
    for task in dict.fromkeys(example[full.label].task for example in answers.values()):
        examples = [example for example in answers.values() if example[full.label].task == task]
        for retention in retentions_of(entrants):
            rivals = [full, *at(entrants, retention)]
            count = f"{len(examples)} example{'s' * (len(examples) != 1)}"
            title = f"### {task}, {100 * retention:g} % of the KV cache: {count}"
            rows = markdown(_HEADER, [_row(entrant, full, examples, entry_bytes) for entrant in rivals])
            parts += [title, rows + kept_note(examples, rivals), _by_length(rivals, examples)]
    return "\n\n".join([*(part.rstrip("\n") for part in parts), NOTE, _settings_note(entrants), *left_out]) + "\n"


def retentions_of(entrants: Sequence[Entrant]) -> list[float]:
    """The retentions compared, each once."""
    return list(dict.fromkeys(one.retention for one in entrants if one.retention is not None))


def at(entrants: Sequence[Entrant], retention: float) -> list[Entrant]:
    """Those that keep this share."""
    return [entrant for entrant in entrants if entrant.retention == retention]


_HEADER = ["policy", "score", "− full", "first token, s", "× full", "decode, tokens/s", "× full", "KV kept"]
_HEADER += ["KV, MiB", "allocated, MiB"]


def _row(entrant: Entrant, full: Entrant, examples: Examples, entry_bytes: int) -> list[str]:
    records, base = _of(entrant, examples), _of(full, examples)
    scores = [record.score for record in records]
    gap = "" if entrant is full else points(paired_estimate(scores, [record.score for record in base]))
    speeds = [record.decode_tokens_per_s for record in records if record.decode_tokens_per_s is not None]
    return [
        entrant.name,
        percent(mean_estimate(scores)),
        gap,
        f"{median(record.ttft_s for record in records):.3f}",
        _times(first_token_gains(records, base)),
        f"{median(speeds):,.1f}" if speeds else "–",
        _times(decode_gains(records, base)),
        f"{100 * kept_share(records):.2f} %",
        f"{fmean(record.kv_entries for record in records) * entry_bytes / MIB:.3f}",
        f"{fmean(record.kv_bytes for record in records) / MIB:.3f}",
    ]


def first_token_gains(records: Sequence[Record], base: Sequence[Record]) -> list[float]:
    """How many times as fast as `base` each first token came, example by example."""
    return [theirs.ttft_s / ours.ttft_s for ours, theirs in zip(records, base, strict=True)]


def decode_gains(records: Sequence[Record], base: Sequence[Record]) -> list[float]:
    """The same for decoding, where both answers had more than one token."""
    speeds = [
        (ours.decode_tokens_per_s, theirs.decode_tokens_per_s) for ours, theirs in zip(records, base, strict=True)
    ]
    return [ours / theirs for ours, theirs in speeds if ours is not None and theirs is not None]


def _by_length(rivals: Sequence[Entrant], examples: Examples) -> str:
    """Score, then gain to the first token, at each length. Nothing where there is but one length."""
    full = rivals[0]
    lengths = sorted({example[full.label].length or 0 for example in examples})
    if len(lengths) == 1:
        return ""

    def table(title: str, cell: Callable[[Entrant, Examples], str]) -> str:
        rows = [
            [one.name, *(cell(one, [e for e in examples if e[full.label].length == length]) for length in lengths)]
            for one in rivals
        ]
        return markdown([title, *(f"{length:,} tokens" for length in lengths)], rows)

    scores = table("score", lambda one, part: percent(mean_estimate([record.score for record in _of(one, part)])))
    gains = table("first token, × full", lambda one, part: _times(first_token_gains(_of(one, part), _of(full, part))))
    return f"{scores}\n{gains}"


def kept_note(examples: Examples, rivals: Sequence[Entrant]) -> str:
    """Whether every policy kept what was wanted of every prompt, and by how much each of the others missed it."""
    retention, missed = rivals[-1].retention, []
    for entrant in rivals[1:]:
        off = misses(_of(entrant, examples), entrant)
        if any(off):
            missed.append(f"{entrant.name} {_signed(fmean(off))} ({_signed(min(off))} to {_signed(max(off))})")
    same = f"int({retention:g} · N) entries of a prompt of N tokens for each layer and KV head, in the mean"
    others = f"; against that, in the mean and of single prompts: {', '.join(missed)}" if missed else ""
    which = "every policy but full" if not missed else "every policy but full and those named here"
    return f"\nCounted in every prompt: {which} kept {same} ({FLOOR} at least){others}.\n"


def misses(records: Sequence[Record], entrant: Entrant) -> list[float]:
    """For each record how much more was kept than wanted, as a share of that."""
    assert entrant.retention is not None
    found = []
    for record in records:
        heads = record.kv_full_entries // record.prompt_tokens  # of all layers
        found.append(record.kv_entries / (heads * wanted(entrant.retention, record.prompt_tokens)) - 1)
    return found


def _settings_note(entrants: Sequence[Entrant]) -> str:
    """Every policy as `--policy` of fastkv-eval takes it."""
    return "The policies, with all that is not their default: " + ", ".join(f"`{one.label}`" for one in entrants) + "."


def _of(entrant: Entrant, examples: Examples) -> list[Record]:
    return [example[entrant.label] for example in examples]


def _times(gains: Sequence[float]) -> str:
    return f"{median(gains):.2f}" if gains else "–"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f} %".replace("-", "−")
