"""What a request cost and kept, for people (rows of text) and for programs (one object)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from fastkv.engine.llm import LLM
from fastkv.engine.output import Metrics, Output

MOST_STAGES = 4  # reductions that are told one by one


def as_json(llm: LLM, output: Output) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "policy": {"name": llm.policy.name, **llm.policy.settings(llm.config.n_layers)},
        "device": str(llm.device),
        "dtype": _dtype_of(llm),
        "metrics": dataclasses.asdict(output.metrics),
    }


def figures(llm: LLM, metrics: Metrics) -> list[tuple[str, str]]:
    """The summary of a request, as (label, text) rows."""
    speed = metrics.decode_tokens_per_s
    rows = [
        ("policy", f"{llm.policy.name}, on {llm.device} in {_dtype_of(llm)}"),
        ("prompt", _tokens(metrics.prompt_tokens)),
    ]
    if not metrics.new_tokens:  # interrupted before there was anything to measure
        return [*rows, ("decode", _tokens(0))]
    rows += [
        ("first token", f"{metrics.ttft_s:.3f} s"),
        ("decode", _tokens(metrics.new_tokens) + ("" if speed is None else f", {speed:,.1f} tokens/s")),
        (
            "KV kept",
            f"{metrics.kv_entries:,} of {metrics.kv_full_entries:,} entries"
            f" ({_percent(metrics.kv_entries, metrics.kv_full_entries)}); allocated, with room for the answer,"
            f" {_mebibytes(metrics.kv_bytes)} of {_mebibytes(metrics.kv_full_bytes)}",
        ),
    ]
    rows += _reductions(llm, metrics)
    if metrics.peak_bytes is not None:
        rows.append(("peak memory", f"{_mebibytes(metrics.peak_bytes)} ({_peak_of(llm)})"))
    return rows


def _reductions(llm: LLM, metrics: Metrics) -> list[tuple[str, str]]:
    """Where the prompt became shorter on its way."""
    first = llm.policy.first_pass(llm.config.n_layers, metrics.prompt_tokens)
    rows = []
    if first is not None:
        share = _percent(first.keep, metrics.prompt_tokens)
        rows.append(("first pass", f"{_tokens(first.keep)} ({share}) chosen at layer {first.layer}, then read anew"))
    stages = [
        f"{_tokens(goes_on)} ({_percent(goes_on, metrics.prompt_tokens)}) go on behind layer {layer}"
        for layer, (seen, goes_on) in enumerate(itertools.pairwise(metrics.layer_tokens))
        if goes_on < seen
    ]
    if len(stages) > MOST_STAGES:
        return [*rows, ("tokens", f"{stages[0]}, fewer from layer to layer, {stages[-1]}")]
    label = "TSP" if hasattr(llm.policy, "tsp_layer") else "tokens"
    return rows + [(label, stage) for stage in stages]


def _dtype_of(llm: LLM) -> str:
    return str(llm.dtype).removeprefix("torch.")


def _peak_of(llm: LLM) -> str:
    return "allocated on the GPU" if llm.device.type == "cuda" else "the whole process"


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' if count != 1 else ''}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
