"""The documents: links lead somewhere, the README stays short, tables and pictures come from results that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_tables_of_the_gpu_are_those_of_the_result() -> None:
    result = ROOT / "benchmarks" / "results" / "2026-11-27-gpu-h200.json"
    printed = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_table.py"), str(result)], capture_output=True, text=True
    )
    assert printed.returncode == 0, printed.stderr
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for table in printed.stdout.strip().split("\n\n"):
        assert table in page


@pytest.mark.parametrize("name", ["README.md", "docs/library.md"])
def test_the_code_of_a_page_runs(name: str) -> None:
    """All blocks of Python of a page, one after the other, from the root of the checkout."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
