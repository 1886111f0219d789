"""What to change: plans that differ from one by one flag, and the longest prompt that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from fastkv.cache.policies import FastKV
from fastkv.cache.policy import drops_tokens
from fastkv.engine.planning.planned import Planned, Wanted, planned
from fastkv.errors import FastKVError
from fastkv.models.split import possible_counts


class Change(NamedTuple):
    """Flags that a plan is changed by, and what it then is."""

    flags: str
    plan: Planned


def changes(wanted: Wanted, memory: int | None) -> list[Change]:
    """Those that could help, each by itself. memory: of a device; None: not known."""
    found = []
    for flags, other in _candidates(wanted, memory):
        try:
            found.append(Change(flags, planned(other)))
        except FastKVError:
            continue  # it does not go with the rest
    return found


def fits(plan: Planned, memory: int | None) -> bool:
    """Whether a rank's memory is enough, so far as that is known."""
    return memory is None or plan.total <= memory


def longest(wanted: Wanted, memory: int | None) -> int | None:
    """The longest prompt, in thousands (1,024) of tokens, that fits with nothing else changed; None: none of so many.

    As far as the model's context goes. Memory is taken to grow with the prompt.
    """
    low, high = 0, wanted.config.context_length // 1024
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits_with(wanted, middle * 1024, memory) else (low, middle - 1)
    return low * 1024 or None


def _fits_with(wanted: Wanted, n_tokens: int, memory: int | None) -> bool:
    try:
        return fits(planned(replace(wanted, n_tokens=n_tokens)), memory)
    except FastKVError:  # beyond the context, with its answer
        return False


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
    enough = next((other for other in more if fits(planned(other), memory)), None)
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
