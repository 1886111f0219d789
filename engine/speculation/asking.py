"""A request that speculates, checked before anything runs."""

from __future__ import annotations

from dataclasses import replace

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import Policy
from fastkv.cache.pool import bytes_of
from fastkv.engine.decode_batch import capacities_of, layout_of
from fastkv.engine.footprint import footprint
from fastkv.engine.plan import plan_request, position_limit
from fastkv.engine.probe import Encode
from fastkv.engine.request import Request, check_request_fits
from fastkv.engine.runtime import Runtime
from fastkv.engine.speculation.figures import MOST_DRAFTED, Speculation
from fastkv.errors import FastKVError


def drafted_from_text(runtime: Runtime, request: Request, speculation: Speculation) -> Request:
    """The request, whose text drafts. Raises FastKVError where memory is too little, or steps choose what they read."""
    if any(request.plan.reads_few):
        raise FastKVError(
            f"speculation ngram does not go with policy {request.plan.policy.name}, whose steps choose what they read: "
            "leave one of them out",
            setting="speculation",
        )
    _check_fits(runtime, request, 0)
    return replace(request, speculation=speculation)


def drafted_by_model(
    runtime: Runtime, drafting: Runtime, whole: Request, policy: Policy, speculation: Speculation, encode: Encode
) -> Request:
    """A request under policy full as one whose tokens are drafted over the entries that `policy` keeps.

    encode: see plan_request. Raises FastKVError where the draft would be the model itself over all entries, for a
    prompt that the policy cannot take, and where memory is too little for both.
    """
    config, plan, model = runtime.model.config, whole.plan, runtime.model
    if isinstance(policy, FullKV) and drafting.model is model:
        raise FastKVError(
            "policy full keeps all entries, so that its drafts cost as much as the answer: take another policy, or "
            'draft_weights="int8"',
            setting="speculation",
        )
    limit = position_limit(config, policy, plan.n_tokens)
    if plan.n_tokens + plan.max_tokens > limit:
        raise FastKVError(
            f"max_tokens must be at most {limit - plan.n_tokens} with speculation, not {plan.max_tokens}: in the "
            f"model's sliding_window of {limit} drafts drop tokens",
            setting="max_tokens",
        )
    draft_plan = plan_request(
        config,
        policy,
        plan.n_tokens,
        plan.max_tokens,
        model.dtype,
        limit,
        encode=encode,
        reduces=False,
        kv_dtype=plan.layout.kv_dtype,
    )
    request = replace(whole, speculation=speculation, draft_plan=draft_plan)
    draft = draft_plan.nbytes + draft_plan.index_nbytes
    _check_fits(runtime, request, draft, drafting.buffers.reusable(draft, {}), drafting.model.makes_floats)
    return request


def _check_fits(runtime: Runtime, request: Request, draft: int, idle: int = 0, floats: int = 0) -> None:
    """FastKVError unless there is memory for both caches, and for steps of as many tokens as may be judged at once.

    draft: bytes of its cache, of which an earlier draft has left so many idle. floats: that a step of it makes of its
    weights.
    """
    slot = bytes_of(layout_of([request]), capacities_of([request]), request.plan.shape)
    plan = request.plan if request.draft_plan is None else request.draft_plan
    draws = request.params.temperature > 0
    looks_up, judged = request.draft_plan is None, MOST_DRAFTED + 1
    needed = footprint(runtime.model, plan, slot + draft, judged=judged, draws=draws, looks_up=looks_up)
    needed = needed._replace(step=needed.step + floats)
    reusable = runtime.buffers.reusable(slot, needed.workspace) + idle
    check_request_fits(runtime.model, plan, needed, reusable)
