"""Which prompts may go by host memory, and by which layers. Knows sizes only; engine/offloading/run.py runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from fastkv.engine.plan import Offload, RequestPlan
from fastkv.errors import FastKVError

# Tokens on the device at a time. A block of keys comes from the host once for as many queries. With G query heads on a
# KV head and 16-bit values each byte of it serves CHUNK * G operations: for 4 heads, at 50 GB/s, 0.8 PFLOP/s (by hand),
# so that attention takes longer than the copies.
CHUNK = 4096


def why_not_offloaded(plan: RequestPlan) -> str | None:
    """What a request has, in words, that host memory does not go with; None: nothing."""
    policy = plan.policy
    for found, what in (
        (not policy.scores_on_host, f"policy {policy.name}, which looks at more of a layer than its last queries"),
        (policy.per_head and plan.compresses, f"policy {policy.name} whose heads keep different numbers of entries"),
        (any(plan.past) or plan.start > 0, "a sequence that continues from a cache"),
        (bool(plan.shared), "share_layers"),
        (plan.lookahead > 0, "lookahead"),
        # No policy that scores on the host has these so far.
        (policy.needs_all_queries or policy.over_layers or plan.first_pass is not None, f"policy {policy.name}"),
        (plan.decides_online, f"policy {policy.name}"),
    ):
        if found:
            return what
    return None


def offloaded(plan: RequestPlan) -> Iterator[RequestPlan]:
    """The plan with its first layers by host memory: those that see all tokens, then all, if these are more.

    The layers after TSP see few tokens, and are faster on the device, if these fit. Of a plan that `why_not_offloaded`
    has nothing against.
    """
    n_layers = len(plan.layers)
    whole = sum(layer.seen == plan.n_tokens for layer in plan.layers)
    for count in dict.fromkeys((whole, n_layers)):
        yield dataclasses.replace(plan, offload=Offload(count, CHUNK))


def planned_for_memory(plan: RequestPlan, allowed: bool, check: Callable[[RequestPlan], None]) -> RequestPlan:
    """The plan itself if there is memory for it; else, where that is allowed, the first way by host memory that fits.

    check: raises FastKVError for a plan for which there is too little. Raises it where no plan fits, and says so where
    host memory would help.
    """
    try:
        check(plan)
        return plan
    except FastKVError as error:
        refused = error
    why_not = why_not_offloaded(plan)
    if why_not is not None:
        raise FastKVError(f"{refused}; offload does not go with {why_not}") if allowed else refused
    last = refused
    for way in offloaded(plan):
        try:
            check(way)
        except FastKVError as error:
            last = error
            continue
        if allowed:
            return way
        raise FastKVError(f"{refused}, or take host memory, too: offload (--offload of fastkv-run and fastkv-chat)")
    raise FastKVError(f"{refused}; and by host memory {last}") if allowed else refused
