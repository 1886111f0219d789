"""Which settings make a policy keep as many entries as the others: int(R * N) a layer and KV head, in the mean.

Or which make a step of it read as much (`Terms.by`): who reads all that it keeps, keeps as much; who reads few, keeps
all, and reads R of the bytes in the mean over the layers, what chooses included (reads.py).

Every policy of POLICIES that has a budget gets it from `kv_retention`, with one and the same floor. PyramidInfer has no
budget but a decay, which is found by its plan. A policy that cannot keep that many takes no part, and says why.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fastkv.cache.catalogue import POLICIES
from fastkv.cache.layer import EntryShape
from fastkv.cache.policies import FullKV, PyramidInfer
from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.policies.read_few import ReadByBudget, ReadFew
from fastkv.cache.policy import Policy, plan_layers
from fastkv.console.parser import flag_of
from fastkv.console.policy_text import build_policy, read_settings, write_settings
from fastkv.errors import FastKVError, check_choice
from fastkv.eval.compare.reads import nearest_read, read_share
from fastkv.eval.policy_spec import PolicySpec, check_twin, take_kv_dtype

FLOOR = 8  # the min_tokens of all: the least that a window of eight tokens allows
NEAR = 0.05  # how far from the others a policy without a budget may be
NEAR_READ = 0.1  # and one that reads whole pages
# What makes the policies equal is nobody's own setting.
EQUAL = {
    "kept": ("kv_retention", "kv_len", "keep_mass", "min_tokens", "decay"),
    "read": ("kv_retention", "kv_len", "keep_mass", "min_tokens", "decay", "read_retention", "read_len"),
}
FLAGS = {"kept": "kv_retention", "read": "read_retention"}  # that say how much
STEPS = 100_000  # decays from 0 to 1 that are tried


@dataclass(frozen=True)
class Terms:
    """What all policies of a comparison share: the model's size, the lengths of the prompts, HeadKV's table.

    kv_dtype: of the entries of those that say nothing of it. by: what is equal, "kept" or "read". dtype, head_dim: of
    entries, which decide what an index costs.
    """

    n_layers: int
    n_kv_heads: int
    lengths: tuple[int, ...]
    head_scores: Path | None = None
    kv_dtype: str | None = None
    by: str = "kept"
    head_dim: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> EntryShape:
        """Of a layer's entries."""
        return EntryShape(self.n_kv_heads, self.head_dim, self.dtype)


class _UnequalError(FastKVError):
    """A policy that cannot keep, or read, as much as the others."""


def wanted(retention: float, n_tokens: int) -> int:
    """Entries that every policy is to keep of a prompt, for each layer and KV head, in the mean."""
    return min(max(int(retention * n_tokens), FLOOR), n_tokens)


def off_by(policy: Policy, retention: float, terms: Terms) -> float:
    """How much more than wanted `policy` plans to keep, or to read, as a share of it: the mean over the lengths."""
    if isinstance(policy, ReadFew) and terms.by == "read":
        shares = (read_share(policy, terms.n_layers, length, terms.shape) for length in terms.lengths)
        return fmean(shares) / retention - 1

    def mean_kept(n_tokens: int) -> float:
        return fmean(plan.kept for plan in plan_layers(policy, terms.n_layers, n_tokens))

    return fmean(mean_kept(length) / wanted(retention, length) - 1 for length in terms.lengths)


def equal_policies(
    texts: Sequence[str] | None, retentions: Sequence[float], terms: Terms
) -> tuple[list[PolicySpec], list[str]]:
    """The full cache, then every policy at each retention; and a line for each that takes no part.

    texts: the policies, as `NAME` or `NAME:setting=value,…`; None means all there are, and only of these one may be
    missing. Raises FastKVError for a mistake in them, for one named twice, and where none is left.
    """
    found, missing = [PolicySpec(FullKV.name, FullKV(), FullKV.name)], []
    for retention in retentions:
        for text in POLICIES if texts is None else texts:
            try:
                if read_settings(text) == (FullKV.name, {}):  # which is there already
                    continue
                spec = _equal_policy(text, retention, terms)
                _check_shares(spec, found, terms)
                check_twin(spec, found, terms.kv_dtype)
                found.append(spec)
            except FastKVError as error:
                if texts is not None or not isinstance(error, _UnequalError):
                    raise FastKVError(f"--policy {text}: {error}") from None
                missing.append(f"{text} is left out: {error}")
    if len(found) == 1:
        raise FastKVError("--policy: there is nothing to compare with the full cache; name another policy")
    return found, list(dict.fromkeys(missing))


def _check_shares(spec: PolicySpec, others: Sequence[PolicySpec], terms: Terms) -> None:
    """FastKVError where two shares give a policy the same settings."""
    for one in others:
        if one.title == spec.title and one.policy == spec.policy and one.retention not in (None, spec.retention):
            flag, shares = flag_of(FLAGS[terms.by]), f"{one.retention} and {spec.retention}"
            raise FastKVError(f"{flag} {shares} give it the same settings; leave one of them out")


def check_names(texts: Sequence[str] | None, head_scores: Path | None) -> None:
    """FastKVError for a policy that there is not, and for a file that none of them reads."""
    known: list[str] = []
    for text in POLICIES if texts is None else texts:
        try:
            name, _ = read_settings(text)
            check_choice("policy", name, POLICIES)
            known += _defaults(POLICIES[name])
        except FastKVError as error:
            raise FastKVError(f"--policy {text}: {error}") from None
    if head_scores is not None and "head_scores" not in known:
        raise FastKVError("--head-scores is for a policy that reads them, and none of these does; leave it out")


def nearest_decay(policy: PyramidInfer, retention: float, terms: Terms) -> float:
    """The decay with which `policy` keeps most nearly what is wanted, in the mean over layers and lengths."""

    def off(step: int) -> float:
        return off_by(dataclasses.replace(policy, decay=step / STEPS), retention, terms)

    high = bisect_left(range(STEPS), True, lo=2, key=lambda step: off(step) >= 0)
    return min(high - 1, high, key=lambda step: abs(off(step))) / STEPS


def _equal_policy(text: str, retention: float, terms: Terms) -> PolicySpec:
    name, own = read_settings(text)
    flag = flag_of(FLAGS[terms.by])
    for setting in own:
        if setting in EQUAL[terms.by]:
            does = "keep" if terms.by == "kept" else "read"
            raise FastKVError(f"{setting} is what makes the policies {does} the same; {flag} sets it for all")
    kv_dtype = take_kv_dtype(own)
    if kv_dtype is not None and terms.by == "read":
        raise FastKVError(
            "kv_dtype: entries are compared in the model's dtype where what is read is equal; leave it out"
        )
    settings = {**own, **_equal_settings(name, own, retention, terms)}
    policy = build_policy(name, settings)
    policy.validate(terms.n_layers, terms.n_kv_heads)
    if isinstance(policy, PyramidInfer):
        settings["decay"] = nearest_decay(policy, retention, terms)
        policy = dataclasses.replace(policy, decay=settings["decay"])
    if isinstance(policy, ReadByBudget) and terms.by == "read":
        found = nearest_read(policy, retention, terms.n_layers, terms.lengths, terms.shape)
        settings["read_retention"], policy = found, dataclasses.replace(policy, read_retention=found)
    off = off_by(policy, retention, terms)
    if abs(off) > _allowed(policy, terms):
        _complain_of_least(policy, retention, terms)
        more, share = ("more" if off > 0 else "less"), 100 * abs(off)
        does = "keeps" if terms.by == "kept" else "reads"
        raise _UnequalError(f"it {does} {share:.1f} % {more} than the others at {flag} {retention:g}")
    told = settings if kv_dtype is None else {**settings, "kv_dtype": kv_dtype}
    return PolicySpec(write_settings(name, told), policy, text, retention, kv_dtype)


def _complain_of_least(policy: Policy, retention: float, terms: Terms) -> None:
    """_UnequalError that says what to do, where a policy reads more than is wanted, however little it chooses."""
    if not isinstance(policy, ReadByBudget) or terms.by != "read":
        return
    least = 1 + off_by(dataclasses.replace(policy, read_retention=1e-6), retention, terms)
    if least > 1 + NEAR_READ:
        raise _UnequalError(
            f"it reads {100 * least * retention:.0f} % of the cache at least, what chooses and dense_layers included: "
            "raise --read-retention, or lower its dense_layers"
        )


def _allowed(policy: Policy, terms: Terms) -> float:
    """How far from the others a policy may be, as a share."""
    if isinstance(policy, ReadFew) and terms.by == "read":
        return NEAR_READ
    return NEAR if isinstance(policy, PyramidInfer) else 0.0


def _equal_settings(name: str, own: dict[str, Any], retention: float, terms: Terms) -> dict[str, Any]:
    """The settings of a policy that make the entries equal. Raises _UnequalError where it has none."""
    policy, settings, head_scores = POLICIES[name], dict[str, Any](), terms.head_scores
    defaults = _defaults(policy)
    if "head_scores" in defaults and "head_scores" not in own:
        if head_scores is None:
            raise _UnequalError("it needs --head-scores FILE")
        settings["head_scores"] = str(head_scores)
    if policy is PyramidInfer:
        # It falls from the first layer on, and no further than to half of the mean: the upper layers keep a share, too.
        pyramid = {"first_layer": 0, "floor": retention / 2}
        settings |= {setting: value for setting, value in pyramid.items() if setting not in own}
    elif issubclass(policy, ReadFew) and terms.by == "read":
        if not issubclass(policy, ReadByBudget):
            raise _UnequalError("how much its steps read, the text decides")
    elif issubclass(policy, Compressed):
        settings["kv_retention"] = retention
        if "tsp_rate" in defaults and not {"tsp_rate", "tsp_len"} & own.keys() and retention > defaults["tsp_rate"]:
            settings["tsp_rate"] = retention  # a layer cannot keep more than reaches it
    else:
        raise _UnequalError("it has no budget that could be made equal")
    window = own.get("window")
    return {**settings, "min_tokens": max(FLOOR, window) if isinstance(window, int) else FLOOR}


def _defaults(policy: type[Policy]) -> dict[str, Any]:
    """The settings of a policy, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(policy)}  # type: ignore[arg-type]
