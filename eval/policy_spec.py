"""The policies of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastkv.cache.layer_map import read_map
from fastkv.cache.policy import Policy
from fastkv.console.policy_text import build_policy, read_settings
from fastkv.errors import FastKVError, check_choice, cut, writable
from fastkv.kernels.packing import KV_DTYPES

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM


@dataclass(frozen=True)
class PolicySpec:
    """A policy of a run. label: all its settings, as `--policy` takes them; it is the policy's name in the records.

    title: as tables name it, where that is shorter. retention: the share of a prompt's KV that it keeps, where a run
    compares policies at equal shares; None for the full cache. kv_dtype, share_layers: see LLM; None as the model was
    loaded.
    """

    label: str
    policy: Policy
    title: str = ""
    retention: float | None = None
    kv_dtype: str | None = None
    share_layers: str | None = None


def parse_policies(texts: list[str], n_layers: int | None = None) -> list[PolicySpec]:
    """The policies of a command line; with `n_layers`, checked against a model of so many.

    Raises FastKVError for an unknown policy, a setting it does not have, a value out of range, and one named twice.
    """
    found: list[PolicySpec] = []
    for text in texts:
        try:
            name, settings = read_settings(text)
            stored: dict[str, Any] = {"kv_dtype": take_kv_dtype(settings), "share_layers": _take_map(settings)}
            spec = PolicySpec(writable(text), build_policy(name, settings), **stored)
            if n_layers is not None:
                spec.policy.validate(n_layers)
            check_twin(spec, found)
        except FastKVError as error:
            raise FastKVError(f"--policy {cut(text, 200)}: {error}") from None
        found.append(spec)
    return found


def take_kv_dtype(settings: dict[str, Any]) -> str | None:
    """Take out of a policy's settings what is none of its own: in what its entries are stored."""
    kv_dtype = settings.pop("kv_dtype", None)
    if kv_dtype is not None:
        check_choice("kv_dtype", kv_dtype, KV_DTYPES)
    return kv_dtype


def _take_map(settings: dict[str, Any]) -> str | None:
    """The same for the file that says which layers read others."""
    name = settings.pop("share_layers", None)
    if name is not None:
        read_map(str(name))
    return None if name is None else str(name)


@contextmanager
def stored_as(llm: LLM, spec: PolicySpec) -> Iterator[None]:
    """Requests that begin meanwhile store their entries as a spec says. FastKVError for another model's map."""
    before = llm.kv_dtype, llm.share_layers
    try:
        llm.kv_dtype = before[0] if spec.kv_dtype is None else spec.kv_dtype
        llm.share_layers = before[1] if spec.share_layers is None else spec.share_layers
        yield
    finally:
        llm.kv_dtype, llm.share_layers = before


def check_twin(spec: PolicySpec, others: list[PolicySpec]) -> None:
    """FastKVError where one of the others is the very same policy."""
    own = spec.policy, spec.kv_dtype, spec.share_layers
    twin = next((one for one in others if (one.policy, one.kv_dtype, one.share_layers) == own), None)
    if twin is not None:
        raise FastKVError(f"is the same policy as {cut(twin.title or twin.label, 200)}; leave one of them out")
