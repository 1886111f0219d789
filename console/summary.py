"""What a request cost and kept, for people (rows of text) and for programs (one object)."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Any

from fastkv.console.parser import flag_of
from fastkv.console.sharing import shared_rows
from fastkv.console.speculation import speculation_rows
from fastkv.console.words import counted
from fastkv.engine.output import LOW_ATTENTION, Metrics, Output, RunInfo

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM
    from fastkv.engine.session import Session
    from fastkv.kernels.calibration import Choice
    from fastkv.models.config import ModelConfig

Rows = list[tuple[str, str]]  # of figures: label, text
MOST_STAGES = 4  # reductions that are told one by one


def as_json(output: Output) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "policy": {"name": output.run.policy, **output.run.settings},
        "device": output.run.device,
        "dtype": output.run.dtype,
        "kv_dtype": output.run.kv_dtype,
        "shared_layers": output.run.shared_layers,
        "offloaded_layers": output.run.offloaded_layers,
        "decode_budget": output.run.decode_budget,
        "ranks": output.run.ranks,
        "warning": warning(output.run, output.metrics),
        "metrics": dataclasses.asdict(output.metrics),
    }


def warning(run: RunInfo, metrics: Metrics) -> str | None:
    """What to do where so little attention mass is kept that the answer is likely to be wrong."""
    if metrics.attention_kept is None or metrics.attention_kept >= LOW_ATTENTION:
        return None
    return f"{_kept(metrics.attention_kept)}: {_more(run.settings)}"


def _more(settings: dict[str, Any]) -> str:
    """What makes a policy with these settings keep more."""
    if "drop_norm" in settings:
        return f"lower {flag_of('drop_norm')}"
    if settings.get("keep_mass") is not None:
        return f"raise {flag_of('keep_mass' if settings['keep_mass_most'] == 1 else 'keep_mass_most')}"
    if settings.get("kv_retention") == 1 and "read_retention" in settings:  # nothing is dropped that a flag could keep
        return f"raise {flag_of('read_retention' if settings.get('read_len') is None else 'read_len')}"
    return f"raise {flag_of('kv_retention' if settings.get('kv_len') is None else 'kv_len')}"


def figures(output: Output) -> Rows:
    """The summary of a request, as (label, text) rows."""
    run, metrics = output.run, output.metrics
    speed = metrics.decode_tokens_per_s
    rows = [
        ("policy", f"{run.policy}, on {run.device} in {run.dtype}{_entries_in(run.kv_dtype)}"),
        *([("ranks", f"{run.ranks}; what follows is of one of them")] if run.ranks > 1 else []),
        ("prompt", _tokens(metrics.prompt_tokens) + _reused(metrics.reused_tokens) + _offloaded(run)),
    ]
    if not metrics.new_tokens:  # interrupted before there was anything to measure
        return [*rows, ("decode", _tokens(0))]
    rows += [
        ("first token", f"{metrics.ttft_s:.3f} s"),
        ("decode", _tokens(metrics.new_tokens) + ("" if speed is None else f", {speed:,.1f} tokens/s")),
        (
            "KV kept",
            f"{metrics.kv_entries:,} of {_entries(metrics.kv_full_entries)}"
            f" ({_percent(metrics.kv_entries, metrics.kv_full_entries)}); allocated, with room for the answer,"
            f" {_mebibytes(metrics.kv_bytes)} of {_mebibytes(metrics.kv_full_bytes)}",
        ),
    ]
    rows += (
        shared_rows(run.shared_layers)
        + _layers(run, metrics)
        + _reductions(run, metrics)
        + _attention(run, metrics)
        + _budget(run)
    )
    rows += speculation_rows(metrics.speculation)
    if metrics.peak_bytes is not None:
        rows.append(("peak memory", f"{_mebibytes(metrics.peak_bytes)} ({_peak_of(run)})"))
    return rows


def context_figures(llm: LLM, session: Session, said: str) -> Rows:
    """What a session holds, as (label, text) rows. said: what follows the number of its tokens."""
    count, full = len(session.ids), len(session.ids) * llm.config.n_layers * llm.config.n_kv_heads
    kept = f"{session.kv_entries:,} of {_entries(full)} ({_percent(session.kv_entries, full)})"
    return [
        ("policy", f"{session.policy.name}, on {llm.device} in {llm.model.precision}{_entries_in(llm.kv_dtype)}"),
        ("context", f"{_tokens(count)} {said}"),
        ("KV kept", f"{kept}, {_mebibytes(session.kv_bytes)}"),
    ]


def saved_figure(path: str) -> tuple[str, str]:
    """The row of a file that was written."""
    return "saved", f"{path}, {_mebibytes(os.path.getsize(path))}"


def _entries_in(kv_dtype: str | None) -> str:
    return "" if kv_dtype is None else f", entries in {kv_dtype}"


def _reused(count: int) -> str:
    return f", after {count:,} that had been read" if count else ""


def _offloaded(run: RunInfo) -> str:
    count = run.offloaded_layers
    return f", {count} layer{'' if count == 1 else 's'} by host memory" if count else ""


def _layers(run: RunInfo, metrics: Metrics) -> Rows:
    """How much the layers keep, where that was not known before they were scored."""
    if run.settings.get("keep_mass") is None and "drop_norm" not in run.settings:
        return []
    if metrics.speculation is not None and metrics.speculation.kind == "self":
        return []  # it is about the draft, and these are the layers that decide
    whole, readers = metrics.kv_full_entries // len(metrics.layer_entries), dict(run.shared_layers)
    own = [count for layer, count in enumerate(metrics.layer_entries) if layer not in readers]
    least, most = (_percent(of(own), whole) for of in (min, max))
    return [("layers", f"keep {least} to {most} of their entries")]


def _reductions(run: RunInfo, metrics: Metrics) -> Rows:
    """Where the prompt became shorter on its way."""
    rows = []
    if run.first_pass_layer is not None:
        chosen = f"{_tokens(metrics.layer_tokens[0])} ({_percent(metrics.layer_tokens[0], metrics.prompt_tokens)})"
        rows.append(("first pass", f"{chosen} chosen at layer {run.first_pass_layer}, then read anew"))
    stages = [
        f"{_tokens(left)} ({_percent(left, metrics.prompt_tokens)}) propagated after layer {layer}"
        for layer, (seen, left) in enumerate(itertools.pairwise(metrics.layer_tokens))
        if left < seen
    ]
    if len(stages) > MOST_STAGES:
        return [*rows, ("tokens", f"{stages[0]}, fewer from layer to layer, {stages[-1]}")]
    label = "TSP" if "tsp_layer" in run.settings else "tokens"
    return rows + [(label, stage) for stage in stages]


def _attention(run: RunInfo, metrics: Metrics) -> Rows:
    """How much of the attention mass is kept, and what to do where that is little."""
    share = metrics.attention_kept
    return [] if share is None or share == 1 else [("attention", warning(run, metrics) or _kept(share))]


def _budget(run: RunInfo) -> list[tuple[str, str]]:
    """That the answer was made from a bounded cache."""
    return [] if run.decode_budget is None else [("budget", f"{run.decode_budget:,} entries a head while decoding")]


def _kept(share: float) -> str:
    return f"kept {100 * share:.0f} % of attention mass"


def _peak_of(run: RunInfo) -> str:
    return "allocated on the GPU" if run.device.startswith("cuda") else "the whole process"


def _tokens(count: int) -> str:
    return counted(count, "token")


def _entries(count: int) -> str:
    return counted(count, "entry", "entries")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def kernels() -> Rows:
    """The choices that were made by measuring (kernels/calibration.py): label, text."""
    from fastkv.kernels import calibration

    if not calibration.is_on():
        return [("kernels", f"not measured: {calibration.VARIABLE} is off")]
    return [("kernel", f"{what}: {_told(choice)}") for what, choice in sorted(calibration.asked().items())]


def _told(choice: Choice) -> str:
    """ "onednn (linear 5.71 ms, onednn 4.90 ms)"."""
    each = ", ".join(f"{way} {1000 * seconds:.2f} ms" for way, seconds in choice.seconds.items())
    return f"{choice.way} ({each})"


def session_figures(session: Session, config: ModelConfig, last: Output | None) -> list[tuple[str, str]]:
    """What a session holds, and the times of its latest turn, as (label, text) rows."""
    n_tokens = len(session.ids)
    full = n_tokens * config.n_layers * config.n_kv_heads
    share = f" ({_percent(session.kv_entries, full)})" if full else ""
    rows = [
        ("tokens", f"{n_tokens:,} of the {config.context_length:,} that the model takes"),
        ("KV kept", f"{session.kv_entries:,} of {_entries(full)}{share}, {_mebibytes(session.kv_bytes)}"),
    ]
    if last is None:
        return rows
    metrics, speed = last.metrics, last.metrics.decode_tokens_per_s
    return [
        *rows,
        ("last prompt", f"{_tokens(metrics.prompt_tokens)} read after {_tokens(metrics.reused_tokens)}"),
        ("first token", f"{metrics.ttft_s:.3f} s"),
        ("decode", _tokens(metrics.new_tokens) + ("" if speed is None else f", {speed:,.1f} tokens/s")),
    ]
