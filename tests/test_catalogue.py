"""The catalogue: a policy is its file and one line, and exports, flags, help and docs follow from that."""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from places import ROOT
from torch import Tensor

import fastkv
from fastkv import FastKV, FastKVError, HeadKV, Policy, PyramidInfer, SnapKV, StreamingLLM
from fastkv.cache import catalogue
from fastkv.cache.catalogue import POLICIES, SETTINGS, SharedSetting
from fastkv.cache.policy import Observation
from fastkv.cache.scores import recent_attention
from fastkv.cache.setting import choice, number, one_or_more, setting, settings_of, whole
from fastkv.cli_flags import build_parser

FOLDER = ROOT / "cache" / "policies"
SHARED_BY_METHODS = {
    "agnostic",
    "compressed",
    "online",
    "optional_tsp",
    "read_few",
    "scored",
    "window_scored",
}  # no policy
PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


def test_every_file_of_the_folder_has_its_line() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} - SHARED_BY_METHODS
    listed = {policy.__module__.rpartition(".")[2] for policy in POLICIES.values()}
    assert listed == files


NEW_POLICY = '''"""Firsts: the first tokens alone."""

from dataclasses import dataclass

from fastkv.cache.policies.compressed import Compressed
from fastkv.cache.setting import setting, whole


@dataclass(frozen=True, kw_only=True)
class Firsts(Compressed):
    stride: int = setting(3, whole(1), "tokens from one to the next", metavar="N")
'''


def test_a_new_policy_is_a_file_and_a_line(tmp_path: Path) -> None:
    """In a copy of the package: flag, help, export and policy are there, and so are the tables."""
    package = tmp_path / "fastkv"
    for folder in ("cache", "console", "kernels"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, package)
    (package / "cache" / "policies" / "firsts.py").write_text(NEW_POLICY)
    listed = package / "cache" / "policies" / "__init__.py"
    line = "from fastkv.cache.policies.firsts import Firsts as Firsts\n"
    listed.write_text(listed.read_text().replace("\nif not TYPE_CHECKING", f"{line}\nif not TYPE_CHECKING"))
    code = """
from fastkv import Firsts
from fastkv.cache.catalogue import setting_table
from fastkv.console.policy_text import build_policy
from fastkv.cli_flags import build_parser
assert build_policy("firsts", {"stride": 4}) == Firsts(stride=4)
assert "| `stride` | firsts | 3 | tokens from one to the next |" in setting_table()
build_parser().print_help()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "structkv, asl, firsts" in said
    assert "--stride N firsts: tokens from one to the next (default 3)" in said


def test_every_policy_is_exported() -> None:
    for policy in (*POLICIES.values(), Policy, fastkv.Observation, fastkv.Stage):
        assert getattr(fastkv, policy.__name__) is policy
        assert policy.__name__ in fastkv.__all__


def test_policies_import_torch_only_where_they_compute() -> None:
    """--help imports these files: at their top, torch is for type checkers alone."""
    for path in [*FOLDER.glob("*.py"), *(ROOT / "cache" / f"{name}.py" for name in ("policy", "setting", "catalogue"))]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "torch" not in ast.unparse(node), path
                assert "scores" not in ast.unparse(node), path


BY_MASS = ["keep_mass", "keep_mass_by", "keep_mass_most"]
REFUSED = {
    "headkv": BY_MASS,
    "kvzip": [*BY_MASS, "tsp_layer", "tsp_rate"],
    "restkv": ["values", "lookahead", "lookahead_reach"],
    "defensivekv": ["lookahead", "lookahead_reach"],
    "defensivekv-layer": [*BY_MASS, "lookahead", "lookahead_reach"],
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_setting_says_what_it_takes_and_what_for(name: str) -> None:
    declared = settings_of(POLICIES[name])
    fields = [field.name for field in dataclasses.fields(POLICIES[name])]  # type: ignore[arg-type]
    assert sorted(set(fields) - set(declared)) == sorted(REFUSED.get(name, []))
    for one in declared.values():
        assert one.help
        assert one.metavar


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in REFUSED.items() for field in fields])
def test_what_a_derived_method_has_no_use_for_is_refused_and_not_listed(name: str, field: str) -> None:
    assert name not in SETTINGS[field].by_policy
    with pytest.raises(FastKVError, match=f"^{field} is no setting of {name}; leave it at (0|None|False|1.0|layer)$"):
        POLICIES[name](**{field: 7})


def test_every_setting_is_a_flag() -> None:
    actions = {action.dest: action for action in build_parser()._actions}
    for name, shared in SETTINGS.items():
        assert actions[name].help == shared.help
        assert actions[name].metavar == shared.metavar
        for one in shared.by_policy.values():  # one flag reads what each of them takes
            assert shared.read.__name__ == one.values.read.__name__
    assert all(name in str(actions["policy"].help) for name in POLICIES)


def test_settings_are_given_by_name() -> None:
    for policy in POLICIES.values():
        with pytest.raises(TypeError):
            policy(1)  # type: ignore[call-arg]


def test_the_tables_of_the_docs_are_the_catalogues() -> None:
    """A failure prints what the page must hold: `python -m fastkv.cache.catalogue`."""
    assert PAGE.endswith(f"{catalogue.policy_table()}\n\n{catalogue.setting_table()}\n")


# --- settings ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Policy):
    share: float = setting(0.5, number(0, 1, above=True), "a share", metavar="R")
    layers: int | tuple[int, ...] | None = setting(
        None, one_or_more(whole(0, 9)), "layers", metavar="I", unset="half way up"
    )
    kind: str = setting("a", choice("a", "b"), "a or b", metavar="a|b")
    free: Any = None  # an ordinary field


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 0}, "share must be a number above 0 and at most 1, not 0"),
        ({"share": None}, "share must be a number above 0 and at most 1, not None"),
        ({"layers": 10}, "layers must be a whole number of at least 0 and at most 9, not 10"),
        ({"layers": (1, -1)}, "layers must be a whole number of at least 0 and at most 9, not -1"),
        ({"layers": ()}, "layers must not be empty"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
    ],
    ids=str,
)
def test_the_base_class_checks_each_setting(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FastKVError) as caught:
        Example(**given)
    assert str(caught.value) == message
    assert caught.value.setting == next(iter(given))


def test_what_a_setting_holds_and_tells() -> None:
    made = Example(layers=[1, 2], free=object)  # type: ignore[arg-type]
    assert made.layers == (1, 2)
    assert list(settings_of(Example)) == ["share", "layers", "kind"]
    assert [one.default for one in settings_of(Example).values()] == ["0.5", "half way up", "a"]
    assert list(made.settings(4)) == ["share", "layers", "kind", "free"]
    assert Example().layers is None
    assert [one.values.read("1") for one in settings_of(Example).values()] == [1.0, 1, "1"]
    assert settings_of(Example)["layers"].values.read("1,2") == (1, 2)


def test_a_name_of_its_own() -> None:
    class Own(SnapKV):
        pass

    class Named(SnapKV):
        name: ClassVar[str] = "other"

    assert (Example.name, Own.name, Named.name, SnapKV.name) == ("example", "own", "other", "snapkv")


def shared(**texts: tuple[str, str]) -> SharedSetting:
    """A setting with the (help, default) of each policy."""
    made = {name: dataclasses.replace(WIDTH, help=help, default=default) for name, (help, default) in texts.items()}
    return SharedSetting("width", made)


WIDTH = settings_of(Example)["share"]


@pytest.mark.parametrize(
    ("texts", "help"),
    [
        ({"fastkv": ("width", "7"), "snapkv": ("width", "7")}, "width (default 7)"),
        ({"fastkv": ("width", "7"), "gemfilter": ("width", "5")}, "width (default 7; gemfilter 5)"),
        ({"fastkv": ("width", ""), "snapkv": ("width", "")}, "width"),
        ({"h2o": ("width", "7"), "asl": ("width", "7")}, "h2o, asl: width (default 7)"),
        (
            {"h2o": ("width", "7"), "adakv": ("width", "7"), "asl": ("width", "5")},
            "h2o, adakv, asl: width (default h2o, adakv 7; asl 5)",
        ),
        (
            {"fastkv": ("width", "7"), "asl": ("the most", "5"), "h2o": ("width", "7")},
            "width (default 7); asl: the most (default 5)",
        ),
    ],
    ids=str,
)
def test_help_of_a_setting_that_policies_share(texts: dict[str, tuple[str, str]], help: str) -> None:
    assert shared(**texts).help == help


# --- a sequence that goes on from a cache ---


def test_which_policies_compress_again() -> None:
    again = {name for name, policy in POLICIES.items() if policy.compresses_again}
    by_window = {"fastkv", "fastkv-paper", "claa", "snapkv", "pyramidkv", "criticalkv", "restkv", "tova"}
    where_heads_are_even = {"keydiff", "expected-attention"}
    reads_few = {"quest", "clusterkv", "rocketkv", "sinkrouter"}
    assert again == by_window | where_heads_are_even | reads_few | {"streamingllm", "pyramidinfer", "structkv", "asl"}


@pytest.mark.parametrize("policy", [FastKV(), SnapKV(), StreamingLLM(), PyramidInfer()], ids=lambda one: one.name)
def test_entries_kept_earlier_are_scored_too(policy: Policy) -> None:
    """40 earlier entries and 3 new tokens, fewer than the window: all earlier ones but the window's get a score."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=generator), torch.randn(2, 2, 43, 8, generator=generator)
    scores = policy.score(Observation(0, q, k, k, n_past=40))
    assert scores.shape == (2, 2, 43 - policy.window)
    assert scores.isfinite().all()


def test_fewer_new_tokens_than_the_window_all_score() -> None:
    """As a window of just these, but that more tokens are kept without a score."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 43, 8, generator=generator)
    assert torch.equal(recent_attention(q, k, 8), recent_attention(q, k, 3)[..., :-5])

    # A kernel of 1: a wider one would pool over what is not scored here.
    def scores(window: int, q: Tensor, k: Tensor) -> Tensor:
        return SnapKV(window=window, kernel=1).score(Observation(0, q, k, k, n_past=40))

    assert torch.equal(scores(8, q, k), scores(3, q, k)[..., :-5])


def test_sinks_stay_the_first_entries() -> None:
    k = torch.zeros(1, 2, 30, 4)
    scores = StreamingLLM(kv_len=10).score(Observation(0, k[:, :, -5:], k, k, n_past=25))
    assert scores.topk(9).indices.sort().values[0, 0].tolist() == [0, 1, 2, 3, *range(24, 29)]


def test_heads_of_different_length_are_not_compressed_again() -> None:
    """A policy whose heads may be even says for these alone that it chooses again (tests/test_agnostic.py)."""
    even = {name for name, policy in POLICIES.items() if "budgets" in settings_of(policy)}
    always = [policy() for name, policy in POLICIES.items() if name not in {"headkv", *even}]
    assert not any(policy.compresses_again for policy in always if policy.per_head)
    assert any(policy.per_head for policy in always)
    assert HeadKV.per_head
    assert not HeadKV.compresses_again
