"""Numbers of things in words: one of them is no plural."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from fastkv.console.sharing import shared_rows
from fastkv.console.speculation import speculation_rows
from fastkv.console.words import counted
from fastkv.engine.speculation.figures import Speculated

# What can be one, and is told with a number in front of it.
_THINGS = "token|answer|prompt|record|message|character|step|layer|pair|example"


def test_counted() -> None:
    assert [counted(count, "token") for count in (0, 1, 2, 1000)] == ["0 tokens", "1 token", "2 tokens", "1,000 tokens"]
    assert [counted(count, "entry", "entries") for count in (1, 2)] == ["1 entry", "2 entries"]


@pytest.mark.parametrize(("drafted", "accepted"), [(0, 0), (1, 1)])
def test_what_speculation_brought_once(drafted: int, accepted: int) -> None:
    told = Speculated("self", drafted, 1, drafted, accepted, None, 0, 0, 0.0, 0.0, None)
    ((label, text),) = speculation_rows(told)
    assert label == "lossless"
    assert text.endswith("1 plain step")
    assert text.startswith("1 of 1 drafted token accepted" if drafted else "nothing drafted, ")


def test_one_layer_that_reads_another() -> None:
    assert shared_rows([(3, 1)]) == [("shared", "1 layer stores no entries of its own: 3 reads 1")]
    assert shared_rows([(3, 1), (4, 1)])[0][1].startswith("2 layers store no entries of their own: ")


def _messages(path: Path) -> Iterator[str]:
    """Each f-string of a file, with {} where a value stands: of whole numbers, for 1.0 is followed by a plural."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(map(_shown, node.values))


def _shown(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    spec = getattr(part, "format_spec", None)
    return "1.0" if spec is not None and "." in ast.unparse(spec) else "{}"


_NEVER_ONE = {"; {} tokens of prompts that begin alike were read once"}  # 64 at least


@pytest.mark.parametrize("folder", ["console", "console/plan", "console/talk"])
def test_no_number_stands_before_a_plural(folder: str) -> None:
    """`counted` says it, so that one is no plural."""
    found = [
        f"{path.name}: {text}"
        for path in sorted((ROOT / folder).glob("*.py"))
        for text in _messages(path)
        if re.search(rf"\{{\}} (\w+ )?({_THINGS})s\b(?!/)", text) and text not in _NEVER_ONE
    ]
    assert found == []
