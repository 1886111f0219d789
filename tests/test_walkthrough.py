"""docs/walkthrough.md cannot go stale: its names exist where it says, and its numbers are computed again."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import ROOT

from fastkv import LLM, FastKV, FullKV
from fastkv.cache.policy import plan_layers
from fastkv.cli_flags import build_parser
from fastkv.eval import cli_flags as eval_flags

PAGE = ROOT / "docs" / "walkthrough.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCES = re.findall(r"^```(?:python)?\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```(?:python)?\n.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
LINKS = re.findall(r"\[([^\]]+)\]\((\S+?)\)", PROSE)
SPANS = re.findall(r"`([^`]+)`", PROSE)
WORDS = " ".join(PROSE.split())
REQUEST, WEAKNESSES = WORDS.split("## Where FastKV is the wrong choice")
SOURCES = [
    *ROOT.glob("*.py"),
    *(path for one in ("cache", "console", "engine", "kernels", "models") for path in (ROOT / one).rglob("*.py")),
]


@cache
def defined(path: Path) -> frozenset[str]:
    """What a file defines: functions, classes, variables of the module, and `Class.member` of methods and fields."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(names)


@cache
def known_words() -> frozenset[str]:
    """Every word that the package's code, its texts and comments apart, is made of."""
    words: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words |= {str(getattr(node, field)) for field in ("name", "id", "arg", "attr") if hasattr(node, field)}
    return frozenset(words)


def flags_of(command: str) -> set[str]:
    """The flags that a command of the page has, by its parser or, for a script, by its text."""
    program, *rest = command.split()
    if program == "python":
        return set(re.findall(r'"(--[a-z-]+)"', (ROOT / rest[0]).read_text(encoding="utf-8")))
    parser = {"fastkv-run": build_parser, "fastkv-eval": eval_flags.build_parser}[program]()
    return set(parser._option_string_actions)


def commands() -> list[str]:
    lines = "\n".join(FENCES).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("fastkv-", "python "))]


def test_links_lead_to_files_that_define_what_they_name() -> None:
    assert len(LINKS) > 50
    for name, target in LINKS:
        if target.startswith(("https://", "#")):
            continue
        path = (PAGE.parent / target).resolve()
        assert path.is_file(), target
        name = name.strip("`")
        assert name == str(path.relative_to(ROOT)) or name in defined(path), f"{target} does not define {name}"


def test_names_in_code_font_exist() -> None:
    flags = flags_of("fastkv-run")
    for span in SPANS:
        if span.startswith("--"):
            assert set(re.findall(r"--[a-z-]+", span)) <= flags, span
        elif "/" in span and not span.startswith("max("):
            assert span.startswith("fastkv-") or (ROOT / span).exists(), span
        elif span.startswith("torch."):
            assert hasattr(torch, span.removeprefix("torch.")), span
        elif re.fullmatch(r"\w+\.\w+", span):
            assert any(span in defined(path) for path in SOURCES), span
        else:  # an expression or a shape: the names in it, single letters apart
            words = set(re.findall(r"[A-Za-z_]\w+", span)) - {"Hq", "Hkv", "fastkv", "run", "eval"}
            assert words <= known_words(), f"{span}: {words - known_words()}"


def test_commands_have_the_flags_they_are_given() -> None:
    assert len(commands()) == 7
    for command in commands():
        assert set(re.findall(r"--[a-z-]+", command)) <= flags_of(command), command


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walkthrough_figures", ROOT / "docs" / "walkthrough_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(script: ModuleType, archive_llm: LLM) -> dict[str, Any]:
    return script.request_figures(archive_llm)


@pytest.fixture(scope="module")
def continued(script: ModuleType, archive_llm: LLM) -> dict[str, Any]:
    return script.continued_figures(archive_llm)


def table_row(first: str) -> list[str]:
    """The other cells of the row that begins with this one."""
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_the_calls_and_their_shapes_are_these(figures: dict[str, Any]) -> None:
    assert figures["calls"] + "\n" in FENCES


def test_the_plan_is_this(figures: dict[str, Any]) -> None:
    for layer, plan in enumerate(plan_layers(FastKV(), 8, figures["metrics"].prompt_tokens)):
        sent = "all" if plan.propagated is None else str(plan.propagated)
        assert table_row(str(layer)) == [str(plan.seen), str(plan.kept), sent]


def test_what_was_kept_of_the_record_is_this(figures: dict[str, Any]) -> None:
    for head in (0, 1):
        assert table_row(f"KV head {head}") == [str(layer[head]) for layer in figures["digits kept"]]
    first, *_, last = figures["digits"]
    assert f"tokens {first} to {last} of the prompt" in WORDS
    assert figures["digits propagated"] == 4
    assert "All four are among the 598 that were propagated" in WORDS
    assert figures["digits kept"][3] == [0, 0]
    assert "neither of layer 3 keeps a digit" in WORDS


def test_the_answer_is_this(figures: dict[str, Any]) -> None:
    assert table_row("token") == [str(token) for token in figures["answer"]]
    assert figures["answer"][-1] == 1


def test_sizes_in_the_prose_are_these(figures: dict[str, Any]) -> None:
    metrics, capacity = figures["metrics"], figures["capacity"]
    kept, seen, sent = metrics.kv_tokens, metrics.prompt_tokens, metrics.tsp_tokens
    for sentence in (
        f"the text has {figures['characters']:,} characters",
        f"gives N = {seen:,} ids",
        f"says {sent}, `int(0.2 * {seen})`, after layer {FastKV().tsp_layer_of(8)}",
        f"says {kept}, `int(0.1 * {seen})`",
        f"has room for {capacity} entries of each KV head, for {kept} of the prompt and 256 tokens to come",
        f"`[1, 2, {capacity}, 32]` for K and the same for V in a",
        f"{metrics.kv_bytes:,} bytes in all",
        f"A full cache would take {metrics.kv_full_bytes:,}",
        f"divides the {kept - 10} entries of a KV head",
        f"takes the {kept - 10}, and the window: {kept} entries",
        f"Of {sent - FastKV().tsp_window} tokens a fifth",
        f"then the last {FastKV().tsp_window}: `[1, {sent}]`",
        f"into entries 0 to {kept - 1}",
        f"{metrics.kv_entries:,} of {metrics.kv_full_entries:,} entries are kept",
        f"has position {seen} and becomes entry {kept}",
        f"over {kept + 1} entries instead of {seen + 1:,}",
        f"After {metrics.new_tokens} tokens and {metrics.new_tokens - 1} steps",
    ):
        assert sentence in REQUEST, sentence


def test_counts_that_rounding_may_shift_are_about_these(figures: dict[str, Any]) -> None:
    """Another processor rounds otherwise, and a few scores change places."""
    same = figures["kept by both heads"]
    for pattern, value, off in (
        (r"in layer 0 only (\d+) of the 299", same[0], 3),
        (r"are the same, in layer 1 (\d+)", same[1], 3),
        (r"scores have ([\d,]+) different values", figures["different scores"], 20),
        (r"In (\d+) of the 16 selections", figures["ties at the border"], 2),
    ):
        (number,) = re.findall(pattern, REQUEST)
        assert abs(int(number.replace(",", "")) - value) <= off, pattern


def test_the_sequence_continues_like_this(continued: dict[str, Any]) -> None:
    assert continued["calls of the second prefill"] + "\n" in FENCES
    shape, new, past = continued["logits of a step"], continued["new tokens"], continued["after a step"]
    back, (kept, position, whole_from) = continued["after truncate"], continued["after the second prefill"]
    assert whole_from == position
    assert continued["propagated"] == new
    for sentence in (
        f"The logits are those after each token, `{shape}`",
        f"afterwards each layer holds {past[0]} entries, and the next position is {past[1]}.",
        f"{back[0]} entries again, and position {back[1]}",
        f"here {back[1]}, the position from which on",
        f'oaken ridge is" are {new} tokens',
        f"each layer already holds {past[0]} entries (`RequestPlan.past`)",
        f"`int(0.1 * {position})` is {kept}",
        f"and {new} are fewer than `min_tokens`",
        f"runs, from position {past[1]}:",
        f"scores its {past[0]} earlier entries",
        f"the window, {past[0] + new - 10} in all",
        f"keeps {kept - 10} of them and the window",
        f"one K and one V of {past[0] + new}",
        f"The next position is {position}, and so is `whole_from`",
    ):
        assert sentence in REQUEST, sentence


def test_the_second_answer_is_right_with_a_full_cache_only(
    continued: dict[str, Any], script: ModuleType, archive_llm: LLM
) -> None:
    assert not continued["second answer right"]
    assert script.continued_figures(archive_llm, FullKV())["second answer right"]


def test_the_code_of_a_sequence_that_continues_runs(script: ModuleType, archive_llm: LLM) -> None:
    (code,) = (fence for fence in FENCES if "llm.decode" in fence)
    assert str(script.SAID) in code
    prompt = (ROOT / "examples" / "archive" / "prompt.txt").read_text(encoding="utf-8").removesuffix("\n")
    more = script.without_bos(archive_llm, "\nQuestion: The access code of the oaken ridge is")
    names = {"llm": archive_llm, "torch": torch, "ids": script.ids_of(archive_llm, prompt), "more_ids": more}
    exec(code, names)
    assert names["pre"].cache.position == len(names["ids"]) + len(script.SAID) + len(more)


def test_no_other_large_number_stands_in_the_request(figures: dict[str, Any], continued: dict[str, Any]) -> None:
    """Those of the tests above, of the shapes, and of the tables: a number that nobody checks can go stale."""
    metrics, calls = figures["metrics"], figures["calls"] + continued["calls of the second prefill"]
    checked = set(re.findall(r"\d+", calls)) | {str(token) for token in figures["answer"]}
    checked |= {str(value) for pair in ("after a step", "after the second prefill") for value in continued[pair]}
    checked |= {str(number) for number in (*figures["digits"], *figures["kept by both heads"][:2], figures["capacity"])}
    checked |= {
        str(metrics.kv_bytes),
        str(metrics.kv_full_bytes),
        str(metrics.kv_entries),
        str(metrics.kv_full_entries),
    }
    checked |= {str(number) for number in (figures["characters"], figures["different scores"])}
    checked |= {
        "256",
        "574",
        "289",
        "290",
        "298",
        "305",
        "2992",
        "2997",
        "1395",
    }  # of the other tests, and of the prompt
    prose = re.sub(r"arXiv [\d.]+|\(https[^)]*\)", "", REQUEST)
    found = {number.replace(",", "") for number in re.findall(r"\d[\d,]+\d", prose)}
    assert found <= checked, found - checked


def test_positions_and_lengths_after_the_answer_are_these(figures: dict[str, Any], archive_llm: LLM) -> None:
    prompt = (ROOT / "examples" / "archive" / "prompt.txt").read_text(encoding="utf-8").removesuffix("\n")
    assert archive_llm.tokenizer is not None
    ids = archive_llm.tokenizer.encode(prompt)
    assert f"the first is BOS ({ids[0]})" in REQUEST
    cache = archive_llm.prefill(ids).cache
    for token in figures["answer"][:-1]:
        archive_llm.decode(cache, torch.tensor([token]))
    position = int(cache.next_position)
    assert f"each layer holds {cache.count(0)} entries, and the next position would be {position}." in REQUEST


def test_the_weaknesses_show(script: ModuleType, archive_llm: LLM) -> None:
    """A small version of the measurements, so that what the page reports can still be measured."""
    late = {name: [script.late_questions(archive_llm, seed, policy) for seed in (0, 2)] for name, policy in policies()}
    several = {name: script.several_questions(archive_llm, 0, policy) for name, policy in policies()}
    for case in ("fed after the prefill", "first in the prompt, fed again after the prefill"):
        assert sum(one[case] for one in late["full"]) > sum(one[case] for one in late["FastKV"])
    assert sum(one["last in the prompt"] for one in late["FastKV"]) == 2
    assert sum(several["full"].values()) > 0.5 > sum(several["FastKV"].values())


def policies() -> list[tuple[str, FullKV | FastKV]]:
    return [("full", FullKV()), ("FastKV", FastKV(min_tokens=8))]
