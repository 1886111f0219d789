"""Tiny models, policies with settings that fit, and lengths."""

from __future__ import annotations

from typing import Any

from fuzz.running_caches import Case
from fuzz.tiny_models import FAMILIES, ROPES, Model
from hypothesis import strategies as st

from fastkv.cache.catalogue import POLICIES, SETTINGS
from fastkv.cache.setting import settings_of

WITH_WINDOW = ("MistralForCausalLM", "MinistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_rates = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
_shares = st.sampled_from([0.0, 0.2, 0.5, 1.0])
_layers = st.integers(0, 3)
# Values of every setting of every policy; those that do not fit the others are refused, and so count as refused.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "kv_retention": _rates,
    "kv_len": st.integers(1, 70),
    "min_tokens": st.integers(8, 20),
    "keep_mass": st.sampled_from([0.3, 0.9, 0.99, 1.0]),
    "keep_mass_by": st.sampled_from(["layer", "head"]),
    "keep_mass_most": _rates,
    "uncounted": st.sampled_from([0, 1, 4, 1000]),
    "drop_norm": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    "window": st.integers(1, 10),
    "queries": st.sampled_from(["sum", "max", "mean"]),
    "pooling": st.sampled_from(["max", "avg", "forward", "adaptive"]),
    "kernel": st.sampled_from([1, 3, 5, 7, 31]),
    "reach": st.integers(0, 30),
    "values": st.booleans(),
    "sinks": st.integers(0, 6),
    "share": _shares,
    "lookahead": st.sampled_from([0, 0, 1, 4]),
    "lookahead_reach": st.none() | st.integers(0, 8),
    "tsp_layer": st.none() | _layers,
    "tsp_rate": _rates,
    "tsp_len": st.none() | st.integers(8, 60),
    "tsp_reach": st.none() | st.integers(0, 30),
    "tsp_window": st.integers(0, 30),
    "narrow": _shares,
    "head_floor": _shares,
    "budgets": st.sampled_from(["even", "heads", "model"]),
    "sketch": st.sampled_from([0, 3, 48]),
    "attention_weight": st.sampled_from([0.0, 0.5, 3.0]),
    "future": st.sampled_from([1, 512]),
    "epsilon": st.sampled_from([0.0, 0.01]),
    "lookback": st.integers(1, 5),
    "full_layers": _layers,
    "beta": st.sampled_from([1.0, 1.35, 5.0]),
    "norm": st.sampled_from(["l1", "l2"]),
    "certain_mass": _shares,
    "alpha": st.sampled_from([0.1, 0.3, 1.0]),
    "chunk": st.sampled_from([1, 7, 40, 2000]),
    "instruct": st.booleans(),
    "recent_share": _shares,
    "filter_layer": st.none() | _layers,
    "first_layer": st.none() | _layers,
    "decay": st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    "floor": st.sampled_from([0.05, 0.3, 1.0]),
    "pivot": st.sampled_from(["change", "mean"]),
    "score_decay": _shares,
    "reading": st.sampled_from(["paper", "code"]),
    "tau": st.sampled_from([0.01, 0.3, 2.0]),
    "read_retention": _rates,
    "read_len": st.integers(1, 70),
    "dense_layers": _layers,
    "page": st.sampled_from([1, 4, 16]),
    "per_cluster": st.sampled_from([1, 8, 80]),
}
MADE_FROM_THE_MODEL = ("head_scores",)


def unknown_settings() -> set[str]:
    """Settings of some policy of which this file says nothing."""
    return set(SETTINGS) - set(VALUES) - set(MADE_FROM_THE_MODEL)


def models() -> st.SearchStrategy[Model]:
    return st.builds(
        _model,
        st.sampled_from(list(FAMILIES)),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([2, 4, 6, 8]),
        st.sampled_from(list(ROPES)),
        st.none() | st.integers(1, 100),
        st.booleans(),
        st.booleans(),
        st.integers(0, 20),
    )


def _model(family: str, *drawn: Any) -> Model:
    *sizes, rope, window, biases, tied, seed = drawn
    return Model(family, *sizes, rope, window if family in WITH_WINDOW else None, biases, tied, seed)


@st.composite
def cases(draw: st.DrawFn, policy: str | None = None) -> Case:
    """A case of this policy, or of any. Half of the prompts are within the model's sliding window."""
    model, name = draw(models()), draw(st.sampled_from(list(POLICIES))) if policy is None else policy
    known = [setting for setting in settings_of(POLICIES[name]) if setting in VALUES]
    chosen = draw(st.lists(st.sampled_from(known), max_size=6, unique=True)) if known else []
    settings = {setting: draw(VALUES[setting]) for setting in chosen}
    if "min_tokens" in known:
        settings.setdefault("min_tokens", 10)  # else a prompt must be long before anything is dropped
    if "tsp_layer" in known and name.startswith("fastkv") and draw(st.integers(0, 5)) == 0 and model.n_layers > 2:
        settings.pop("tsp_len", None)
        settings |= {"tsp_layer": (0, model.n_layers - 2), "tsp_rate": (0.7, 0.4)}
    lengths = draw(st.lists(st.integers(1, 120), min_size=1, max_size=4).map(tuple))
    if model.window is not None and draw(st.booleans()):
        lengths = tuple(max(1, min(length, model.window - 4)) for length in lengths)
    return Case(
        model,
        name,
        tuple(settings.items()),
        lengths,
        draw(st.integers(1, 5)),
        draw(st.integers(0, 1000)),
        draw(st.integers(1, 60)),
        draw(st.booleans()),
    )
