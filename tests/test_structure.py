"""The shape of the package: imports run one way, nothing heavy comes with `import fastkv`, one version."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from places import ROOT

import fastkv

LAYERS = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "cache": {"cache", "kernels"},
    "engine": {"engine", "models", "cache", "kernels"},
    "console": {"console", "engine", "models", "cache", "kernels"},
    "report": {"report", "console", "engine", "models", "cache", "kernels"},
    "eval": {"eval", "console", "engine", "models", "cache", "kernels"},
}
EVERYWHERE = {"errors", "storage"}


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
    """cli -> console -> engine -> {models, cache} -> kernels; models and cache do not know each other."""
    for path in (ROOT / layer).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fastkv" and len(parts) > 1 and parts[1] not in EVERYWHERE:
                assert parts[1] in LAYERS[layer], f"{path} imports {name}"


def module_files() -> dict[str, Path]:
    """Every file of the package by the full name of its module; a package's own is its __init__.py."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(path for top in LAYERS for path in (ROOT / top).rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("fastkv", *parts)).removesuffix(".__init__")] = path
    return found


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each module imports, wherever in its file: in functions and for type checkers too.

    `from fastkv.a import b` means the module fastkv.a.b where there is one. A module imports its parent packages too,
    as every module does, which does not count.
    """
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name].update(one if one in files else node.module for one in inner)
        graph[name] &= files.keys()
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that all import each other, directly or by way of others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting.extend(graph[name])
        reached[start] = found
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return sorted(map(list, groups))


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(graph) == [["b", "c"], ["e"]]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = import_graph(module_files())
    assert "fastkv.models.config" in graph["fastkv.engine.loaded"]
    assert circles(graph) == []


def test_nothing_that_could_run_a_models_code_is_used() -> None:
    forbidden = re.compile(r"\b(pickle|torch\.load|trust_remote_code|transformers|flash_attn|exec|eval)\b")
    for path in module_files().values():
        tree = ast.parse(path.read_text())
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | imported(path)
        used |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in used if forbidden.fullmatch(name)], path


def test_packages_listed_are_the_packages_there_are() -> None:
    listed = set(
        re.findall(r'"(fastkv(?:\.[a-z_.]+)?)"', (ROOT / "pyproject.toml").read_text().split("packages = ")[1])
    )
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


def test_nothing_outside_the_cache_asks_what_a_cache_is() -> None:
    """A new layout of layers needs no other file: nobody looks for the class of a cache, a pool or a layer."""
    classes = re.compile(r"\w*(?:KVCache|KVPool|KVLayer|DenseLayer|PerHeadLayer|PerHead)")
    for top in set(LAYERS) - {"cache"}:
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type"):
                    assert not classes.search(ast.unparse(node)), f"{path}: {ast.unparse(node)}"
