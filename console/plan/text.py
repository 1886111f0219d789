"""A plan for people: the answer first, then what it is made of, and what a change would bring."""

from __future__ import annotations

from fastkv.console.plan.answer import BOUND_BY, Answer, memory_parts, working_parts
from fastkv.console.plan.changes import Change, Longest, context_text, fits, narrowly
from fastkv.console.words import counted
from fastkv.engine.memory import size_text
from fastkv.engine.planning.expected import Parts
from fastkv.engine.planning.machine import Machine
from fastkv.engine.planning.planned import Planned

_UNKNOWN = "–"


def lines(answer: Answer, model: str) -> list[str]:
    """The whole text. model: its name."""
    rows = [("request", _request(answer.plan, model)), *_memory(answer), *_times(answer), *_limits(answer)]
    rows += [("not known", why) for why in answer.times.unknown]
    rows += [("note", note) for note in answer.times.notes]
    return [_first(answer), *(f"{label:<12} {text}" for label, text in rows), *_changes(answer)]


def _first(answer: Answer) -> str:
    memory, needed = answer.machine.memory, size_text(answer.plan.total)
    who = _who(answer.plan, answer.machine)
    if memory is None:
        return f"{who} needs {needed}; how much memory it has is not known: give --memory"
    of = f"{who} needs {needed} of {size_text(memory)}"
    if not answer.fits:
        return f"does not fit: {of}"
    return f"fits narrowly: {of}, and the figure may be off by a tenth" if answer.narrow else f"fits: {of}"


def _who(plan: Planned, machine: Machine) -> str:
    ranks = plan.wanted.ranks
    if machine.kind == "cpu":
        return "this machine" if ranks == 1 else f"each of {ranks} ranks, which share this machine,"
    return f"one GPU ({machine.name})" if ranks == 1 else f"each of {ranks} GPUs ({machine.name})"


def _request(plan: Planned, model: str) -> str:
    wanted, request = plan.wanted, plan.request
    prompts = f"{counted(wanted.batch, 'prompt')} of " if wanted.batch > 1 else ""
    precision = str(wanted.dtype).removeprefix("torch.") + (", int8 weights" if wanted.weights else "")
    stored = f", {wanted.kv_dtype} entries" if wanted.kv_dtype else ""
    answer = f"an answer of {counted(request.max_tokens, 'token')}"
    return (
        f"{model} in {precision}{stored}, policy {request.policy.name}, "
        f"{prompts}{counted(request.n_tokens, 'token')} and {answer}"
    )


def _memory(answer: Answer) -> list[tuple[str, str]]:
    parts, working = memory_parts(answer.plan), working_parts(answer.plan)
    return [
        ("memory", ", ".join(f"{size_text(int(size))} {name}" for name, size in parts.items())),
        ("of that", ", ".join(f"{size_text(int(size))} {name}" for name, size in working.items())),
    ]


def _times(answer: Answer) -> list[tuple[str, str]]:
    first, step, rows = answer.times.first, answer.times.step, []
    if first is not None:
        rows.append(("first token", f"{seconds_text(sum(first.values()))}: {_shares(first)}"))
    if step is not None:
        total = sum(step.values())
        each = f"{'' if answer.plan.wanted.batch == 1 else ' in all'}, {seconds_text(total)} a step"
        rows.append(("decode", f"{answer.plan.wanted.batch / total:,.1f} tokens/s{each}: {_shares(step)}"))
    if rows:
        rows.append(("times", _source(answer)))
    return rows


def _source(answer: Answer) -> str:
    machine, ranks = answer.machine, answer.plan.wanted.ranks
    told = f"by a cost model, from {machine.told}"
    if ranks == 1 or machine.link is None:
        return told
    link = (
        f"{machine.link.bandwidth / 1e9:g} GB/s {machine.link.source}, {1e6 * machine.link.latency:g} µs an all-reduce"
    )
    return f"{told}; nothing was measured on {ranks} GPUs: {link}"


def _limits(answer: Answer) -> list[tuple[str, str]]:
    told = [f"memory by {answer.memory_limit}"]
    names = {"first_token": "the first token", "decode": "decode"}
    told += [f"{names[what]} by {part} ({BOUND_BY[part]})" for what, part in answer.time_limits.items()]
    return [("limited", "; ".join(told))]


def _shares(parts: Parts) -> str:
    total = sum(parts.values())
    named = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{100 * size / total:.0f} % {name}" for name, size in named)


def _changes(answer: Answer) -> list[str]:
    told = [""] if answer.changes or answer.longest else []
    if answer.changes:
        memory = answer.machine.memory
        enough = sorted(answer.changes, key=lambda each: _rank(each.plan.total, memory))
        table = [("one change", "memory", "first token", "tokens/s"), *(_row(each, memory) for each in enough)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        told += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
    if answer.longest is not None:
        told.append(f"the longest prompt that fits as it is: {_longest(answer.longest)}")
    if answer.offload is not None:
        sizes = size_text(answer.offload.device), size_text(answer.offload.host)
        how = "fits narrowly" if narrowly(answer.offload.device, answer.machine.memory) else "fits"
        told.append(f"with --offload it {how}: {sizes[0]} of the GPU, and {sizes[1]} of host memory")
    return told


def _longest(longest: Longest) -> str:
    """As --context takes it, and what says that no more does."""
    told = f"--context {context_text(longest.n_tokens)}, by {longest.by}"
    return f"{told}; narrowly" if longest.narrow else told


def _rank(nbytes: int, memory: int | None) -> int:
    """What fits first, then what fits narrowly."""
    return 2 if not fits(nbytes, memory) else int(narrowly(nbytes, memory))


def _row(change: Change, memory: int | None) -> tuple[str, str, str, str]:
    times, enough = change.times, ("", ", fits narrowly", ", does not fit")[_rank(change.plan.total, memory)]
    first = _UNKNOWN if times.first is None else seconds_text(sum(times.first.values()))
    speed = _UNKNOWN if times.step is None else f"{change.plan.wanted.batch / sum(times.step.values()):,.1f}"
    return change.flags, size_text(change.plan.total) + enough, first, speed


def seconds_text(seconds: float) -> str:
    """With about three digits, of ms where it is less than a second."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1e3 * seconds, "ms")
    if value < 0.001:
        return f"under 0.001 {unit}"
    digits = next((digits for digits, most in enumerate((99.95, 9.995, 0.9995)) if value >= most), 3)
    return f"{value:,.{digits}f} {unit}"
