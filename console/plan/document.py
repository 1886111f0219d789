"""A plan for programs: the object that --json prints. Bytes, seconds, tokens."""

from __future__ import annotations

from typing import Any

from fastkv.console.plan.answer import BOUND_BY, Answer, memory_parts, working_parts
from fastkv.console.plan.changes import fits, narrowly
from fastkv.engine.planning.expected import Expected


def as_json(answer: Answer, model: str) -> dict[str, Any]:
    """model: its name."""
    plan, wanted, machine = answer.plan, answer.plan.wanted, answer.machine
    return {
        "fits": None if machine.memory is None else answer.fits,
        "narrow": answer.narrow,
        "needed_bytes": plan.total,
        "device_bytes": machine.memory,
        "model": model,
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "weights": wanted.weights,
        "kv_dtype": wanted.kv_dtype,
        "policy": {"name": wanted.policy.name, **wanted.policy.settings(wanted.config.n_layers)},
        "context": plan.request.n_tokens,
        "max_tokens": plan.request.max_tokens,
        "decode_budget": None if wanted.decode_budget is None else wanted.decode_budget.entries,
        "batch": wanted.batch,
        "gpus": wanted.ranks,
        "device": machine.name,
        "memory_bytes": memory_parts(plan),
        "working_bytes": working_parts(plan),
        **_times(answer.times, wanted.batch),
        "limits": {"memory": answer.memory_limit, **_limits(answer)},
        "not_known": list(answer.times.unknown),
        "notes": list(answer.times.notes),
        "source": {"told": machine.told, "machine": machine.source, "reached": machine.reached.source},
        "changes": [
            {
                "flags": each.flags,
                "fits": fits(each.plan.total, machine.memory),
                "narrow": narrowly(each.plan.total, machine.memory),
                "needed_bytes": each.plan.total,
                **_totals(each.times, each.plan.wanted.batch),
            }
            for each in answer.changes
        ],
        "longest_context": None if answer.longest is None else answer.longest.n_tokens,
        "offload": None
        if answer.offload is None
        else {
            "narrow": narrowly(answer.offload.device, machine.memory),
            "device_bytes": answer.offload.device,
            "host_bytes": answer.offload.host,
        },
    }


def _times(times: Expected, batch: int) -> dict[str, Any]:
    return {**_totals(times, batch), "first_token_parts_s": times.first, "step_parts_s": times.step}


def _totals(times: Expected, batch: int) -> dict[str, Any]:
    step = None if times.step is None else sum(times.step.values())
    return {
        "first_token_s": None if times.first is None else sum(times.first.values()),
        "step_s": step,
        "tokens_per_s": None if step is None else batch / step,
    }


def _limits(answer: Answer) -> dict[str, Any]:
    return {what: {"part": part, "bound_by": BOUND_BY[part]} for what, part in answer.time_limits.items()}
