"""What to change: plans that differ from one by one flag, and the longest prompt that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from fastkv.cache.policies import FastKV
from fastkv.cache.policy import drops_tokens
from fastkv.engine.planning.expected import Expected, expected
from fastkv.engine.planning.machine import Machine
from fastkv.engine.planning.planned import Planned, Wanted, planned
from fastkv.errors import FastKVError
from fastkv.models.split import possible_counts

OFF_BY = 0.1  # share of the memory that figures may be off by (benchmarks/plan_memory.py)


class Change(NamedTuple):
    """Flags that a plan is changed by, what it then is, and how long that takes."""

    flags: str
    plan: Planned
    times: Expected


class Longest(NamedTuple):
    """The longest prompt that fits, in tokens.

    by: what allows no more. narrow: whether it fits by less than the figures may be off.
    """

    n_tokens: int
    by: str
    narrow: bool


def changes(plan: Planned, machine: Machine) -> list[Change]:
    """Those that help, each by itself: less memory, or a time that is known and shorter."""
    found, now = [], _seconds(plan, expected(plan, machine))
    for flags, wanted in _candidates(plan.wanted, machine.memory):
        try:
            other = planned(wanted)
        except FastKVError:
            continue  # it does not go with the rest
        times = expected(other, machine)
        if other.total < plan.total or any(map(_shorter, _seconds(other, times), now)):
            found.append(Change(flags, other, times))
    return found


def _seconds(plan: Planned, times: Expected) -> tuple[float | None, float | None]:
    """To the first token, and for each token of all answers."""
    first = None if times.first is None else sum(times.first.values())
    return first, None if times.step is None else sum(times.step.values()) / plan.wanted.batch


def _shorter(seconds: float | None, than: float | None) -> bool:
    return seconds is not None and than is not None and seconds < than


def fits(nbytes: int, memory: int | None) -> bool:
    """Whether a rank's memory is enough for so much, so far as that is known."""
    return memory is None or nbytes <= memory


def narrowly(nbytes: int, memory: int | None) -> bool:
    """Whether it is enough by less than the figures may be off."""
    return memory is not None and nbytes <= memory < nbytes * (1 + OFF_BY)


def longest(plan: Planned, memory: int) -> Longest | None:
    """The longest prompt that fits with nothing else changed, an answer of the same length included; None: none does.

    Memory is taken to grow with the prompt.
    """
    wanted = replace(plan.wanted, max_tokens=plan.request.max_tokens)
    low, high = 0, wanted.config.context_length
    while low < high:
        middle = (low + high + 1) // 2
        needed = _needed_with(wanted, middle)
        low, high = (middle, high) if needed is not None and needed <= memory else (low, middle - 1)
    needed = _needed_with(wanted, low) if low else None
    if needed is None:
        return None
    return Longest(low, _limit(wanted, low), narrowly(needed, memory))


def _limit(wanted: Wanted, n_tokens: int) -> str:
    """What does not allow a token more than so many."""
    if _needed_with(wanted, n_tokens + 1) is not None:
        return "the memory"
    whole = n_tokens + (wanted.max_tokens or 0) == wanted.config.context_length
    return "the model's context" if whole else "the model's sliding_window"


def _needed_with(wanted: Wanted, n_tokens: int) -> int | None:
    """Bytes for a prompt of so many tokens; None: the model takes no such prompt with its answer."""
    try:
        return planned(replace(wanted, n_tokens=n_tokens)).total
    except FastKVError:
        return None


def _candidates(wanted: Wanted, memory: int | None) -> Iterator[tuple[str, Wanted]]:
    yield from _more_gpus(wanted, memory)
    yield from _other_policies(wanted)
    if wanted.kv_dtype is None:
        yield "--kv-dtype int8", replace(wanted, kv_dtype="int8")
    if wanted.weights is None:
        yield "--weights int8", replace(wanted, weights="int8")
    if wanted.batch > 1:
        yield f"--batch {wanted.batch // 2}", replace(wanted, batch=wanted.batch // 2)
    if wanted.n_tokens >= 2048:
        yield f"--context {context_text(wanted.n_tokens // 2)}", replace(wanted, n_tokens=wanted.n_tokens // 2)


def _more_gpus(wanted: Wanted, memory: int | None) -> Iterator[tuple[str, Wanted]]:
    """The next number of GPUs, and the first one that is enough; on a CPU ranks share what there is."""
    if wanted.device.type == "cpu":
        return
    more = [replace(wanted, ranks=n) for n in possible_counts(wanted.config) if n > wanted.ranks]
    enough = next((other for other in more if fits(planned(other).total, memory)), None)
    for other in dict.fromkeys([*more[:1], *([enough] if enough else [])]):
        yield f"--gpus {other.ranks}", other


def _other_policies(wanted: Wanted) -> Iterator[tuple[str, Wanted]]:
    policy, sizes = wanted.policy, (wanted.config.n_layers, wanted.n_tokens)
    if not drops_tokens(policy, *sizes):
        if drops_tokens(FastKV(), *sizes):
            yield "--policy fastkv", replace(wanted, policy=FastKV())
        return
    half = _half_retention(policy)
    if half is not None:
        yield f"--kv-retention {half.kv_retention:g}", replace(wanted, policy=half)


def _half_retention(policy: Any) -> Any:
    """The same policy with half of its kv_retention; None where that is no setting of it, or does not decide."""
    if not hasattr(policy, "kv_retention") or getattr(policy, "kv_len", None) is not None:
        return None
    try:
        return replace(policy, kv_retention=policy.kv_retention / 2)
    except FastKVError:
        return None


def context_text(n_tokens: int) -> str:
    """As --context takes it, and as short as that can be."""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if n_tokens % size == 0:
            return f"{n_tokens // size}{suffix}"
    return str(n_tokens)
