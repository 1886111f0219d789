"""The documents cannot go stale: links lead somewhere, code runs, flags exist, figures are those of the results."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv.cache.catalogue import POLICIES
from fastkv.cli_flags import build_parser
from fastkv.console.batch.flags import build_parser as build_batch_parser
from fastkv.console.plan.flags import build_parser as build_plan_parser
from fastkv.console.talk.flags import build_parser as build_chat_parser

FOLDERS = (".", "docs", "benchmarks/results", "examples/archive")
PAGES = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))}
RESULTS = ROOT / "benchmarks" / "results"
GPU, ACCURACY = RESULTS / "2026-11-27-gpu-h200.json", RESULTS / "2026-11-27-archive-accuracy.md"


def prose(page: str) -> str:
    """A page without its blocks of code and its spans of code."""
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda span: re.sub(r"[\[\]()]", "", span.group()), text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_github() -> None:
    assert anchors("# A b\n```\n# no\n```\n## 7. `min_tokens`, here\n") == {"a-b", "7-min_tokens-here"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert path.exists(), f"{page}: {target} is not there"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target} has no such heading"


def test_the_readme_is_short_and_shows_first_what_matters() -> None:
    lines = PAGES["README.md"].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    first_screen = "\n".join(lines[:20])
    for shown in ("make run", "make test", "docs/images/overview.png", "arxiv.org/abs/2502.01068"):
        assert shown in first_screen


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    for page in PAGES:
        if page.startswith("docs/") or page in ("CONTRIBUTING.md", "CHANGELOG.md"):
            assert f"]({page})" in readme


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_code_of_a_page_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), names)
    assert capsys.readouterr().out.startswith(" 1395.\n stop ")


def test_flags_of_fastkv_run_exist() -> None:
    known = set(build_parser()._option_string_actions)
    told, heading, _ = PAGES["docs/command.md"].read_text(encoding="utf-8").partition("\n## fastkv-batch")
    assert heading
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", told)) <= known
    for page, text in ((page, path.read_text(encoding="utf-8")) for page, path in PAGES.items()):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(\.venv/bin/)?fastkv-run ", line):
                flags = {word for word in shlex.split(line.partition("|")[0], comments=True) if word.startswith("--")}
                assert flags <= known, f"{page}: {flags - known}"


def test_flags_of_fastkv_batch_exist() -> None:
    known = set(build_batch_parser()._option_string_actions)
    _, _, told = PAGES["docs/command.md"].read_text(encoding="utf-8").partition("\n## fastkv-batch")
    assert "--shard-size" in told
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", told)) <= known


def test_flags_of_fastkv_chat_exist() -> None:
    """A flag of fastkv-run that it lacks is for prompts in files, for what is written of them, or for no session."""
    known = set(build_chat_parser()._option_string_actions)
    told = PAGES["docs/chat.md"].read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", told)) <= known
    lacking = set(build_parser()._option_string_actions) - known
    of_files = {"--prompt", "--prompts", "--output", "--batch-size", "--kv-memory", "--context", "--save-cache"}
    of_files |= {
        "--reuse-prefix",
        "--decode-budget",
        "--lossless",
        "--speculation",
        "--draft-tokens",
        "--draft-weights",
        "--share-layers",
    }
    assert lacking - of_files == {"--chat", "--json", "--report", "--verbose"}


def test_flags_of_fastkv_plan_exist() -> None:
    known = set(build_plan_parser()._option_string_actions)
    told = PAGES["docs/plan.md"].read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", told)) <= known


def test_every_policy_is_in_the_readme() -> None:
    lines = PAGES["README.md"].read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`(\w[\w-]*)`", cell)]
    assert named == list(POLICIES)


# --- figures ---


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The scripts of benchmarks/, which is a folder and no package."""
    names = ("gpu_table", "overview_plot")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_the_tables_of_the_speed_page_are_those_of_the_results(
    scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page = PAGES["docs/speed.md"].read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- python benchmarks/gpu_table.py (.+?) -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    assert len(blocks) == 3
    for arguments, table in blocks:
        assert scripts["gpu_table"].main(arguments.split()) == 0
        assert capsys.readouterr().out == table + "\n", f"print it anew: benchmarks/gpu_table.py {arguments}"


def test_the_readme_has_the_speeds_of_the_results(scripts: dict[str, Any]) -> None:
    speeds = PAGES["README.md"].read_text(encoding="utf-8").split("\n## Speed\n")[1].split("\n## ")[0]
    tables = scripts["gpu_table"].markdown(json.loads(GPU.read_text()), ["first", "decode"]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables if line.startswith("|")]
    for context in ("8,192", "32,768", "131,072"):
        first = {row[2]: row for row in rows if row[:2] == [context, "auto"]}
        decode = {row[2]: row for row in rows if row[:2] == [context, "1"]}
        cells = [first["full"][3], *first["fastkv"][3:5], decode["full"][3], *decode["fastkv"][3:5]]
        assert f"| {' | '.join([context, *cells])} |" in speeds


def test_the_aims_are_compared_with_the_results() -> None:
    """What falls short of an aim is told with the measured figure, in the README and on the page of speed."""
    figures = {(each["step"], each["case"]): each for each in json.loads(GPU.read_text())["figures"]}

    def share(step: str, case: str) -> str:
        return f"{100 * figures[step, case]['of_copy']:.0f} %"

    def ratio(step: str, fastkv: str, full: str, key: str) -> str:
        return f"{figures[step, full][key] / figures[step, fastkv][key]:.2f}"

    plain = ratio("decode", "fastkv 128K x 1", "full 128K x 1", "step_ms")
    compiled = ratio("compiled", "fastkv 131,072", "full 131,072", "step_ms")
    first = ratio("first-128k", "fastkv 128K auto", "full 128K auto", "ttft_s")
    short = share("decode", "full 1K x 1"), share("compiled", "full 1,024")
    long = share("decode", "fastkv 128K x 1"), share("compiled", "fastkv 131,072")
    speed = PAGES["docs/speed.md"].read_text(encoding="utf-8")
    for measured in (
        f"| 75 % | {short[0]}; with `--compile` {short[1]} |",
        f"| 75 % | {long[0]}; with `--compile` {long[1]} |",
        f"| 1.7 | {plain}; with `--compile` {compiled} |",
        f"| 1.75 | {first} |",
    ):
        assert measured in speed
    limits = PAGES["README.md"].read_text(encoding="utf-8").split("\n## Limits\n")[1].split("\n## ")[0]
    bandwidth = f"{short[0]} of the bandwidth of a copy ({short[1]} with"
    for measured in (bandwidth, f"{plain} times as fast", f"({compiled} times"):
        assert measured in " ".join(limits.split())


def test_tables_leave_out_what_was_not_measured(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(GPU.read_text())
    result["figures"] = [each for each in result["figures"] if each["case"] != "full 8K x 1" and each["step"] != "peer"]
    result["figures"].append({"step": "million", "case": "512K", "status": "skipped", "why": "no time"})
    tables = scripts["gpu_table"].markdown(result, scripts["gpu_table"].TABLES)
    assert re.search(r"^\| 8,192 \| 1 \| fastkv \| 177.9 \| – \|", tables, re.MULTILINE)
    assert "transformers" not in tables
    assert "512K" not in tables
    result = json.loads((RESULTS / "2026-11-28-gpu-h200.json").read_text())
    lost = ("full 1,024", "cudnn 8K attention", "fastkv 8K flash", "fastkv 32K all tokens")
    result["figures"] = [each for each in result["figures"] if each["case"] not in lost]
    tables = scripts["gpu_table"].markdown(result, ["tsp-layer", "padding", "regions"])
    assert "| 8K | first token, a new length | – | 240.4 | 152.2 |" in tables
    assert not re.search(r"8K \| one attention|32,768 \| first token|1,024 \| full", tables)
    for text, complaint in (("no", "is no JSON file"), ("[]", "is no result of gpu_suite.py")):
        (tmp_path / "other.json").write_text(text)
        assert scripts["gpu_table"].main([str(tmp_path / "other.json")]) == 2
        assert complaint in capsys.readouterr().err


def test_the_picture_shows_the_results(scripts: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = scripts["overview_plot"].figure_of(json.loads(GPU.read_text()), ACCURACY.read_text(encoding="utf-8"))
    shown = [[text.get_text() for text in panel.texts] for panel in figure.axes]
    assert shown[0] == ["11.0 s", "6.1 s\n1.8× as fast"]
    assert shown[1] == ["98", "162\n1.7× as fast"]
    assert shown[2] == ["97.1", "90.5", "81.9", "43.8", "78.3", "99.0", "92.4", "81.0", "42.9", "78.8"]
    picture = tmp_path / "out.png"
    assert scripts["overview_plot"].main([str(GPU), str(ACCURACY), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_says_what_it_lacks(scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for arguments, complaint in (
        ((RESULTS / "2026-11-27-gpu-h200-million.json", ACCURACY), "lacks the first token or decoding"),
        ((GPU, ROOT / "README.md"), "has no columns tokens, full"),
        ((GPU, ROOT / "missing.md"), "missing.md"),
    ):
        assert scripts["overview_plot"].main([*map(str, arguments), "out.png"]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
