"""Counts and settings of the policies: two decisions, each from the original length, neither looking at the other."""

from __future__ import annotations

from typing import Any

import pytest

from fastkv import FastKV, FastKVError, FullKV
from fastkv.cache.policy import Policy, Stage, drops_tokens, plan_layers


def sizes(policy: Policy, n_layers: int, n_tokens: int) -> list[tuple[int, int]]:
    """(seen, kept) of each layer."""
    return [(plan.seen, plan.kept) for plan in plan_layers(policy, n_layers, n_tokens)]


def test_full_sees_and_keeps_everything() -> None:
    assert sizes(FullKV(), 3, 100) == [(100, 100)] * 3
    assert not drops_tokens(FullKV(), 3, 100)


def test_defaults_are_the_papers() -> None:
    assert sizes(FastKV(), 32, 10_000) == [(10_000, 1000)] * 16 + [(2000, 1000)] * 16


@pytest.mark.parametrize(("n_layers", "layer"), [(32, 15), (36, 17), (40, 19), (8, 3), (5, 1), (2, 0), (1, 0)])
def test_default_tsp_layer(n_layers: int, layer: int) -> None:
    assert FastKV().tsp_layer_of(n_layers) == layer


@pytest.mark.parametrize("n_tokens", [1387, 1001, 999, 2816, 12_345])
def test_rates_truncate_the_float_product(n_tokens: int) -> None:
    policy = FastKV(tsp_rate=0.29, kv_retention=0.07, min_tokens=8)
    assert sizes(policy, 4, n_tokens)[-1] == (int(0.29 * n_tokens), int(0.07 * n_tokens))


def test_float_products_are_not_rounded() -> None:
    """0.29 * 100 is 28.999999999999996 in floats: the reference truncates it to 28, and so do we."""
    assert FastKV(tsp_rate=0.29, min_tokens=8).stages(4, 100)[0].keep == 28


def test_budget_counts_from_the_original_length_after_tsp_too() -> None:
    """int(n_tsp * kv/tsp) would give later layers 149 where the others keep 150."""
    policy = FastKV(tsp_rate=0.3, kv_retention=0.15, min_tokens=8)
    assert {kept for _, kept in sizes(policy, 8, 1003)} == {150}


def test_a_layer_never_keeps_more_than_it_saw() -> None:
    policy = FastKV(tsp_layer=0, tsp_rate=0.1, kv_retention=0.5, min_tokens=8)
    assert sizes(policy, 3, 1000) == [(1000, 500), (100, 100), (100, 100)]


def test_floor_lifts_the_rates_but_never_above_the_prompt() -> None:
    assert sizes(FastKV(), 4, 500) == [(500, 128)] * 2 + [(128, 128)] * 2
    assert sizes(FastKV(), 4, 100) == [(100, 100)] * 4
    assert not drops_tokens(FastKV(), 4, 128)
    assert drops_tokens(FastKV(), 4, 129)


def test_absolute_lengths_win_over_rates_and_floor() -> None:
    policy = FastKV(tsp_rate=0.9, kv_retention=0.9, tsp_len=60, kv_len=20)
    assert sizes(policy, 4, 500) == [(500, 20)] * 2 + [(60, 20)] * 2
    assert sizes(policy, 4, 40) == [(40, 20)] * 4
    assert sizes(policy, 4, 15) == [(15, 15)] * 4


@pytest.mark.parametrize("kv", [{"kv_retention": 0.9}, {"kv_len": 9000}, {"kv_retention": 1.0}])
def test_tsp_does_not_look_at_the_kv_budget(kv: dict[str, Any]) -> None:
    """The reference skips TSP for prompts shorter than the KV budget; here the two never meet."""
    assert FastKV(**kv).stages(8, 5000) == FastKV(kv_retention=0.01).stages(8, 5000)


@pytest.mark.parametrize("tsp", [{"tsp_rate": 1.0}, {"tsp_len": 300}, {"tsp_layer": 7}])
def test_tsp_that_reduces_nothing_is_one_stage(tsp: dict[str, Any]) -> None:
    """A rate of 1, a length of at least the prompt, and the last layer (nothing comes after it)."""
    assert FastKV(**tsp).stages(8, 300) == [Stage(range(8))]


def test_stages_cover_all_layers_once() -> None:
    stages = FastKV(tsp_layer=4).stages(9, 5000)
    assert [layer for stage in stages for layer in stage.layers] == list(range(9))
    assert stages[0] == Stage(range(5), 1000)


BAD = [
    ("tsp_layer", [-1, 1.5, "3", True]),
    ("tsp_rate", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "x", None]),
    ("kv_retention", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "x", None]),
    ("tsp_len", [0, 7, -5, 10.5, "x"]),
    ("kv_len", [0, 7, -5, 10.5, "x"]),
    ("window", [0, -1, 1.5, "x"]),
    ("kernel", [0, 2, 6, -1, 1.5]),
    ("pooling", ["mean", "", None, 3]),
    ("min_tokens", [0, -1, 1.5]),
    ("queries", ["mean", "", None, 3]),
    ("reach", [-1, 1.5, "x", 5000]),
    ("tsp_reach", [-1, 1.5, "x", 5000]),
    ("tsp_window", [-1, 1.5, "x", None]),
    ("values", [1, "yes", None]),
    ("sinks", [-1, 0.5]),
    ("share", [-0.1, float("nan"), "x"]),
    ("narrow", [-0.1, 1.1, float("nan"), "x"]),
]


@pytest.mark.parametrize(("setting", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(FastKVError, match=setting) as caught:
        FastKV(**{setting: value})
    assert caught.value.setting == setting
    assert "\n" not in str(caught.value)


def test_a_tsp_layer_outside_the_model_is_refused() -> None:
    FastKV(tsp_layer=5).validate(6)
    with pytest.raises(FastKVError, match="tsp_layer must be below the model's number of layers"):
        FastKV(tsp_layer=6).validate(6)


def test_policies_are_values() -> None:
    assert FastKV() == FastKV(tsp_rate=0.2)
    assert len({FastKV(), FastKV(), FullKV()}) == 2


def test_several_stages_each_from_the_original_length() -> None:
    policy = FastKV(tsp_layer=(2, 5, 7), tsp_rate=(0.5, 0.2, 0.1), kv_retention=0.15)
    seen = [plan.seen for plan in plan_layers(policy, 10, 2000)]
    assert seen == [2000] * 3 + [1000] * 3 + [400] * 2 + [200] * 2
    assert [plan.kept for plan in plan_layers(policy, 10, 2000)] == [300] * 8 + [200] * 2
    lengths = FastKV(tsp_layer=[2, 5], tsp_len=[700, 300])  # type: ignore[arg-type]
    assert [plan.seen for plan in plan_layers(lengths, 8, 2000)] == [2000] * 3 + [700] * 3 + [300] * 2
    assert hash(lengths) == hash(FastKV(tsp_layer=(2, 5), tsp_len=(700, 300)))
    assert policy.settings(10)["tsp_layer"] == (2, 5, 7)
    assert FastKV(tsp_layer=3).settings(10)["tsp_layer"] == 3


def test_stages_that_reduce_nothing_are_none() -> None:
    """The floor makes the two equal; after the last layer nothing is left to be saved."""
    policy = FastKV(tsp_layer=(1, 2, 9), tsp_rate=(0.5, 0.2, 0.1), min_tokens=600)
    assert policy.stages(10, 1000) == [Stage(range(2), 600), Stage(range(2, 10))]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tsp_layer": (5, 2), "tsp_rate": (0.5, 0.2)}, "tsp_layer must rise"),
        ({"tsp_layer": (2, 2), "tsp_rate": (0.5, 0.2)}, "tsp_layer must rise"),
        ({"tsp_layer": (2, 5), "tsp_rate": (0.2, 0.5)}, "tsp_rate must fall"),
        ({"tsp_layer": (2, 5), "tsp_rate": 0.2}, "1 for 2"),
        ({"tsp_layer": (2, 5)}, "1 for 2"),
        ({"tsp_rate": (0.5, 0.2)}, "2 for 1"),
        ({"tsp_layer": (2, 5), "tsp_len": (100, 200)}, "tsp_len must fall"),
        ({"tsp_layer": (2, 5), "tsp_len": (100, 7)}, "tsp_len must be at least the window"),
        ({"tsp_layer": ()}, "tsp_layer must not be empty"),
        ({"tsp_layer": (2, -1), "tsp_rate": (0.5, 0.2)}, "tsp_layer"),
        ({"tsp_layer": (2, 5), "tsp_rate": (0.5, 0.0)}, "tsp_rate"),
    ],
    ids=str,
)
def test_stages_that_cannot_be(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(FastKVError, match=named):
        FastKV(**settings)


def test_the_last_of_several_layers_must_be_in_the_model() -> None:
    FastKV(tsp_layer=(2, 5), tsp_rate=(0.5, 0.2)).validate(6)
    with pytest.raises(FastKVError, match="below the model's number of layers"):
        FastKV(tsp_layer=(2, 6), tsp_rate=(0.5, 0.2)).validate(6)
