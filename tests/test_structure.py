"""The shape of the package: imports run one way, nothing heavy comes with `import fastkv`, one version."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from places import ROOT

import fastkv

LAYERS = {
    "models": {"models"},
    "cache": {"cache"},
    "engine": {"engine", "models", "cache"},
    "report": {"report", "engine", "models", "cache"},
    "eval": {"eval", "engine", "models", "cache", "cli", "cli_flags"},
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    """cli -> engine -> {models, cache}; models and cache do not know each other."""
    for path in (ROOT / layer).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fastkv" and len(parts) > 1 and parts[1] != "errors":
                assert parts[1] in LAYERS[layer], f"{path} imports {name}"


def test_nothing_that_could_run_a_models_code_is_used() -> None:
    forbidden = re.compile(r"\b(pickle|torch\.load|trust_remote_code|transformers|flash_attn|exec|eval)\b")
    for folder in ("", "models", "cache", "cache/policies", "engine", "report", "eval", "eval/tasks"):
        for path in (ROOT / folder).glob("*.py"):
            tree = ast.parse(path.read_text())
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | imported(path)
            used |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not [name for name in used if forbidden.fullmatch(name)], path


def test_packages_listed_are_the_packages_there_are() -> None:
    listed = set(re.findall(r'"(fastkv(?:\.[a-z.]+)?)"', (ROOT / "pyproject.toml").read_text().split("packages = ")[1]))
    folders = {"fastkv"} | {
        "fastkv." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for top in LAYERS
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert folders <= listed


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastkv.__version__)
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"## {fastkv.__version__}" in (ROOT / "CHANGELOG.md").read_text()
