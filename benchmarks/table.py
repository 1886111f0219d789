"""From samples to rows, and from rows to the printed table. Times nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cost import Ceilings
from runners import Sample

from fastkv import LLM
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Policy, plan_layers
from fastkv.engine.cost import decode_bytes, first_pass_flops, prefill_flops

BASELINE = "full"
COLUMNS = (
    "context",
    "batch",
    "",
    "first token, s",
    "× full",
    "of FLOP ceiling",
    "decode, tokens/s",
    "× full",
    "× batch 1",
    "of bandwidth",
    "end to end, s",
    "× full",
    "KV, MiB",
    "peak, MiB",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def summarise(
    samples: dict[str, list[Sample]], llm: LLM, ceilings: Ceilings, context: int, batch: int, new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each policy: medians, range, ratios to the full cache, and shares of the ceilings."""
    rows = []
    for name, taken in samples.items():
        row: dict[str, Any] = {"context": context, "batch": batch, "name": name, **figures(taken)}
        if name in POLICIES:
            row |= _shares_of_ceilings(row, POLICIES[name](), llm, ceilings, new_tokens)
        rows.append(row)
    full = next((row for row in rows if row["name"] == BASELINE), None)
    if full is not None:
        for row in rows:
            row["prefill_to_full"] = full["ttft_s"] / row["ttft_s"]
            row["decode_to_full"] = row["decode_tokens_per_s"] / full["decode_tokens_per_s"]
            row["total_to_full"] = full["total_s"] / row["total_s"]
    return rows


def _shares_of_ceilings(
    row: dict[str, Any], policy: Policy, llm: LLM, ceilings: Ceilings, new_tokens: int
) -> dict[str, float]:
    """Products and bytes that the policy cannot avoid, as shares of what the machine can do in the time it took."""
    config, context, batch = llm.config, row["context"], row["batch"]
    plans = plan_layers(policy, config.n_layers, context)
    read = decode_bytes(config, plans, new_tokens / 2, llm.dtype.itemsize, batch)
    shares = {"decode_of_ceiling": read * row["decode_tokens_per_s"] / batch / ceilings.bandwidth}
    if policy.online_selector(config.n_layers, context) is None:  # else the plan is no more than an upper bound
        first = policy.first_pass(config.n_layers, context)
        flops = prefill_flops(config, plans, batch)
        flops += first_pass_flops(config, first.layer, context, batch) if first is not None else 0
        shares["prefill_of_ceiling"] = flops / row["ttft_s"] / ceilings.flops
    return shares


def compare_with_one(rows: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    """Add to the rows of a batch how many times the tokens/s of one prompt it has; `alone`: those rows, if measured."""
    ones = {row["name"]: row["decode_tokens_per_s"] for row in alone}
    for row in rows:
        if row["name"] in ones:
            row["decode_to_one"] = row["decode_tokens_per_s"] / ones[row["name"]]


def figures(taken: Sequence[Sample]) -> dict[str, Any]:
    """Medians with their range, the most memory of all runs, and the runs themselves."""
    ttft = [sample.ttft_s for sample in taken]
    speed = [sample.decode_tokens_per_s for sample in taken]
    total = [sample.total_s for sample in taken]
    peaks = [sample.peak_bytes for sample in taken if sample.peak_bytes is not None]
    return {
        "ttft_s": statistics.median(ttft),
        "ttft_range": [min(ttft), max(ttft)],
        "decode_tokens_per_s": statistics.median(speed),
        "decode_range": [min(speed), max(speed)],
        "total_s": statistics.median(total),
        "total_range": [min(total), max(total)],
        "kv_bytes": taken[0].kv_bytes,
        "peak_bytes": max(peaks, default=None),
        "samples": [asdict(sample) for sample in taken],
    }


def table_row(row: dict[str, Any]) -> str:
    """A row as a line of the table; a dash where there is nothing to compare with, or nothing was measured."""

    def share(key: str) -> str:
        return f"{100 * row[key]:.0f} %" if key in row else "–"

    def ratio(key: str) -> str:
        return f"{row[key]:.2f}" if key in row else "–"

    def mebibytes(key: str) -> str:
        return "–" if row[key] is None else f"{row[key] / 2**20:,.1f}"

    def median(key: str, span: str, digits: int) -> str:
        low, high = row[span]
        return f"{row[key]:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"

    cells = (
        f"{row['context']:,}",
        str(row["batch"]),
        row["name"],
        median("ttft_s", "ttft_range", 3),
        ratio("prefill_to_full"),
        share("prefill_of_ceiling"),
        median("decode_tokens_per_s", "decode_range", 1),
        ratio("decode_to_full"),
        ratio("decode_to_one"),
        share("decode_of_ceiling"),
        median("total_s", "total_range", 3),
        ratio("total_to_full"),
        mebibytes("kv_bytes"),
        mebibytes("peak_bytes"),
    )
    return f"| {' | '.join(cells)} |"


def head(about: dict[str, Any]) -> str:
    """What the rows belong to and what their columns mean, as a list above the table."""
    flops, bandwidth = about["ceilings"]["flops"] / 1e9, about["ceilings"]["bandwidth"] / 1e9
    baseline = (
        "how many times as fast as this engine's own full cache (policy full), same context and batch, same run"
        if BASELINE in about["policies"]
        else "nothing: policy full was not measured in this run"
    )
    lines = (
        ("model", f"{about['model']}, {about['weights']} weights, {about['dtype']}"),
        ("device", f"{about['device']}; torch {about['torch']}, Python {about['python']}, fastkv {about['fastkv']}"),
        ("date", about["date"]),
        ("ceilings", f"{flops:,.0f} GFLOP/s in products, {bandwidth:,.1f} GB/s in reading, measured in this run"),
        (
            "runs",
            f"{about['rounds']} of each, in turn, after one that is not counted; medians (lowest – highest); fresh "
            f"random token ids; {about['new_tokens']} new tokens for each prompt",
        ),
        ("batch", "prompts that decode together; time to the first tokens of all of them, tokens/s of all of them"),
        ("× full", baseline),
        ("× batch 1", "how many times the tokens/s of one prompt, same context, same run"),
        ("peak", f"during the first warm-up, with no memory of other runs left, {_peak_of(about)}"),
    )
    return "\n".join(f"- {label}: {text}" for label, text in lines)


def _peak_of(about: dict[str, Any]) -> str:
    where = "allocated on the GPU" if about["on_gpu"] else "resident memory of the whole process"
    return f"{where}, weights included" + (", the peer's own copy of them too" if about["peer"] else "")
