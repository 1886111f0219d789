"""Prompts of a list that begin alike share the prefill of that beginning.

The first of them reads it, and the others continue from a copy, as the turns of a session do. Where nothing of the
beginning is dropped, that changes no more than how sums are rounded.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from torch import Tensor

from fastkv.cache.policy import Policy
from fastkv.engine.batch import slots_that_fit, slots_there
from fastkv.engine.beginning import Beginning
from fastkv.engine.plan import keeping_all, plan_request, position_limit
from fastkv.engine.probe import Encode
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime
from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama

LEAST = 64  # tokens; to read fewer takes hardly longer than to copy them


class Group(NamedTuple):
    """Prompts, by their places in the list, ascending, that share their first `length` tokens."""

    members: list[int]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be read."""
        return (len(self.members) - 1) * self.length


class Work(NamedTuple):
    """What a list comes to: its requests, how many of them at a time, and bytes for their slots (None: no limit)."""

    requests: list[Request]
    n_slots: int
    kv_memory: int | None


def check_reuse(policy: Policy, config: ModelConfig) -> None:
    """FastKVError for a policy whose prompts cannot go on after what it kept of their beginning."""
    if policy.first_pass(config.n_layers, config.context_length) is not None:
        raise FastKVError(
            f"reuse_prefix does not go with policy {policy.name}, which reads what it chooses as a prompt of its own, "
            "at other positions, so that nothing can go on after it; leave it out, or take another policy",
            setting="reuse_prefix",
        )


def share(
    runtime: Runtime,
    requests: list[Request],
    policy: Policy,
    reuse: bool | None,
    batch_size: int,
    kv_memory: int | None,
    encode: Encode,
) -> Work:
    """Let requests of a list share what they begin with.

    reuse: None means where nothing of them is dropped, so that it is exact. What is shared takes memory from the slots,
    but leaves at least half of them: of more beginnings than that has room for, those that save most are shared.
    encode: see plan_request.
    Raises FastKVError as `slots_that_fit` does.
    """
    n_slots = slots_that_fit(runtime, requests, batch_size, kv_memory)
    begun = [] if reuse is False else _beginnings(runtime.model, requests, policy, bool(reuse), encode)

    def work(count: int) -> Work:
        """With the first `count` of them."""
        shared, held = _continued(runtime.model, requests, begun[:count]), _held_at_most(begun[:count], len(requests))
        readers = [replace(shared[group.members[0]], ids=each.ids, plan=each.plan) for group, each in begun[:count]]
        slots = slots_there(runtime, [*shared, *readers], min(batch_size, len(requests)), kv_memory, held)
        return Work(shared, slots, None if kv_memory is None else kv_memory - held)

    count = bisect_left(range(1, len(begun) + 1), True, key=lambda count: 2 * work(count).n_slots < n_slots)
    return work(count) if count else Work(requests, n_slots, kv_memory)


def _beginnings(
    model: Llama, requests: Sequence[Request], policy: Policy, compressed: bool, encode: Encode
) -> list[tuple[Group, Beginning]]:
    """What can be shared, those first that save most. compressed: also what a policy drops tokens of."""
    places = [i for i, each in enumerate(requests) if _may_share(each, compressed)]
    found = []
    for group in common_beginnings([requests[place].ids[0] for place in places]):
        members = sorted(places[member] for member in group.members)
        limit = position_limit(model.config, policy, group.length)
        kv_dtype = requests[members[0]].plan.layout.kv_dtype
        plan = plan_request(model.config, policy, group.length, 0, model.dtype, limit, encode=encode, kv_dtype=kv_dtype)
        begun = Beginning(requests[members[0]].ids[:, : group.length], plan, len(members))
        reach = max(requests[member].plan.n_tokens + requests[member].max_tokens for member in members)
        if plan.is_exact or (compressed and reach <= limit):
            found.append((Group(members, group.length), begun))
    return sorted(found, key=lambda one: -one[0].saved)


def _may_share(request: Request, compressed: bool) -> bool:
    """Whether a request can go on after a copy of its beginning. compressed: also where that has lost something."""
    plan = request.plan
    plain = request.turn is None and plan.decode_budget is None and plan.offload is None
    return plain and (compressed or plan.is_exact)


def _continued(model: Llama, requests: Sequence[Request], begun: Sequence[tuple[Group, Beginning]]) -> list[Request]:
    """The requests, those of a group with only the rest of their prompts, which is kept whole."""
    shared = list(requests)
    for group, shared_beginning in begun:
        beginning = replace(shared_beginning)
        for member in group.members:
            one = requests[member]
            ids, limit, rest = one.ids[:, group.length :], one.plan.position_limit, keeping_all(one.plan.policy)
            plan = plan_request(model.config, rest, ids.shape[1], one.max_tokens, model.dtype, limit, beginning)
            first = member == group.members[0]
            shared[member] = replace(one, ids=ids, plan=plan, beginning=beginning, reads_beginning=first)
    return shared


def _held_at_most(begun: Sequence[tuple[Group, Beginning]], n_requests: int) -> int:
    """Bytes of all copies that are there at a time: each from its first prompt on to its last one."""
    changes = [0] * (n_requests + 1)
    for group, beginning in begun:
        changes[group.members[0]] += beginning.plan.nbytes
        changes[group.members[-1] + 1] -= beginning.plan.nbytes
    return max(accumulate(changes))


# --- which prompts begin alike ---


@dataclass
class _Alike:
    """Neighbours in sorted order that share `length` tokens: those in groups that share more, and the others."""

    length: int
    groups: list[Group] = field(default_factory=list)
    single: list[int] = field(default_factory=list)

    def take(self, other: _Alike) -> None:
        """The next neighbours, which share as much with these."""
        self.groups += other.groups
        self.single += other.single

    def grouped(self) -> _Alike:
        """A group of those in none, joined by the groups that save less by themselves, if that saves more."""
        apart = [group for group in self.groups if group.saved >= len(group.members) * self.length]
        joining = [group.members for group in self.groups if group.saved < len(group.members) * self.length]
        together = [*apart, *self._group([*self.single, *chain.from_iterable(joining)])]
        as_they_are = [*self.groups, *self._group(self.single)]
        groups = max(as_they_are, together, key=lambda groups: sum(group.saved for group in groups))
        return _Alike(self.length, groups, self.single if len(self.single) == 1 and groups is as_they_are else [])

    def _group(self, members: list[int]) -> list[Group]:
        return [Group(members, self.length)] if len(members) > 1 else []


def common_beginnings(prompts: Sequence[Tensor], least: int = LEAST) -> list[Group]:
    """Groups of prompts (each int64 [N]) that begin alike. A prompt is in one group at most.

    Each keeps one token at least of its own, and each group shares `least` tokens at least. In sorted order, prompts
    that begin alike are neighbours, and what neighbours share nests: a longer beginning lies within a shorter one. From
    the longer to the shorter ones, each prompt is put where it saves more.
    """
    keys = [array("q", prompt.tolist()).tobytes() for prompt in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    found, unfinished = _Alike(0), list[_Alike]()
    for one, other in pairwise([*order, None]):
        assert one is not None
        length = 0 if other is None else common(prompts[one], prompts[other])
        length = length if length >= least else 0
        inner = _Alike(0, single=[one])
        while unfinished and unfinished[-1].length > length:
            alike = unfinished.pop()
            alike.take(inner)
            inner = alike.grouped()
        if not length:
            found.take(inner)
        elif unfinished and unfinished[-1].length == length:
            unfinished[-1].take(inner)
        else:
            unfinished.append(_Alike(length, inner.groups, inner.single))
    return found.groups


def common(one: Tensor, other: Tensor) -> int:
    """How many tokens two prompts begin alike with, one of each left over."""
    shorter = min(one.shape[0], other.shape[0])
    differ = (one[:shorter] != other[:shorter]).nonzero()
    return min(shorter - 1, int(differ[0])) if differ.shape[0] else shorter - 1
