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


_STORED = ("kv_dtype", "share_layers")  # of a spec: how entries are stored, which is no setting of its policy


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


def parse_policies(texts: list[str], n_layers: int | None = None, kv_dtype: str | None = None) -> list[PolicySpec]:
    """The policies of a command line; with `n_layers`, checked against a model of so many. kv_dtype: see check_twin.

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
            check_twin(spec, found, kv_dtype)
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
    """Requests that begin meanwhile store their entries as a spec says.

    FastKVError for another model's map. A complaint about what the spec says of it names the spec, and not a flag.
    """
    before = llm.kv_dtype, llm.share_layers
    try:
        llm.kv_dtype = before[0] if spec.kv_dtype is None else spec.kv_dtype
        llm.share_layers = before[1] if spec.share_layers is None else spec.share_layers
        yield
    except FastKVError as error:
        if error.setting not in _STORED or getattr(spec, error.setting) is None:
            raise
        raise type(error)(f"--policy {cut(spec.title or spec.label, 200)}: {error}") from None
    finally:
        llm.kv_dtype, llm.share_layers = before


def check_stored(llm: LLM, spec: PolicySpec, length: int, max_tokens: int) -> None:
    """FastKVError unless entries can be stored as a spec, or the model, says: by a request that never runs."""
    if spec.kv_dtype is None and spec.share_layers is None and llm.kv_dtype is None:
        return
    from fastkv.engine.sampler import SamplingParams

    with stored_as(llm, spec):
        llm.stream([0] * length, SamplingParams(max_tokens=max_tokens), spec.policy)


def check_twin(spec: PolicySpec, others: list[PolicySpec], kv_dtype: str | None = None) -> None:
    """FastKVError where one of the others is the very same policy. kv_dtype: of entries of which a spec says nothing.

    Layers are compared by what a file says of them, wherever it is.
    """

    def of(one: PolicySpec) -> tuple[object, ...]:
        pairs = () if one.share_layers is None else read_map(one.share_layers).pairs
        return one.policy, one.kv_dtype or kv_dtype, pairs

    twin = next((one for one in others if of(one) == of(spec)), None)
    if twin is not None:
        raise FastKVError(f"is the same policy as {cut(twin.title or twin.label, 200)}; leave one of them out")
