"""docs/policies.md cannot go stale: its own policy runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

import fastkv
from fastkv import LLM, FullKV, Policy, SamplingParams

PAGE = ROOT / "docs" / "policies.md"
TEXT = PAGE.read_text(encoding="utf-8")
SCRIPT = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[0]
PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names of the script before it loads a model."""
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(SCRIPT.partition("\nllm = ")[0], str(PAGE), "exec", dont_inherit=True), names)
    return names


def slow_keydiff(keys: torch.Tensor, kept: int, window: int) -> list[int]:
    """keys [T, D] of one head: one key at a time."""
    unit = [key.double() / key.double().norm() for key in keys]
    mean = sum(unit[1:], unit[0]) / len(unit)
    alike = [float(key @ mean / mean.norm()) for key in unit]
    before = sorted(range(len(unit) - window), key=lambda token: alike[token])
    return sorted([*before[: kept - window], *range(len(unit) - window, len(unit))])


@pytest.mark.parametrize("window", [8, 1, 0])
def test_the_pages_policy_keeps_the_keys_least_like_the_mean(tiny_llm: LLM, page: dict[str, Any], window: int) -> None:
    full = tiny_llm.prefill(PROMPT, FullKV())
    made = page["KeyDiff"](kept=0.2, window=window)
    ours = tiny_llm.prefill(PROMPT, made)
    for layer in (0, 3, 5):
        for head in (0, 1):
            assert ours.kept[layer][0, head].tolist() == slow_keydiff(full.cache.read(layer)[0].k[0, head], 60, window)


def test_the_library_takes_any_policy(tiny_folder: Path, tiny_llm: LLM, page: dict[str, Any]) -> None:
    policy: Policy = page["KeyDiff"](kept=0.5)
    assert policy.name == "keydiff"
    params, ids = SamplingParams(max_tokens=5, ignore_eos=True), PROMPT[0].tolist()
    alone = tiny_llm.generate(ids, params, policy=policy)
    assert alone.metrics.kv_tokens == 150
    assert [out.token_ids for out in tiny_llm.generate([ids, ids], params, policy)] == [alone.token_ids] * 2
    own = LLM(tiny_folder, policy=policy, dtype="float32", device="cpu")
    assert own.generate(ids, params).token_ids == alone.token_ids


def test_the_pages_script_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(SCRIPT, str(PAGE), "exec", dont_inherit=True), {"__name__": __name__})
    assert "(1,495 of 2,991 entries kept)" in capsys.readouterr().out


def test_every_hook_is_told_and_links_lead_to_files() -> None:
    hooks = {name for name in vars(Policy) if not name.startswith("_")} - {"settings"}
    told = set(re.findall(r"^\| `(\w+)", TEXT, re.MULTILINE)) | set(re.findall(r", `(\w+)\(", TEXT))
    assert hooks <= told
    for target in re.findall(r"\]\((\.\./\S+?)\)", TEXT):
        assert (PAGE.parent / target).is_file(), target
    for name in re.findall(r"`fastkv\.([A-Z]\w+)`", TEXT):
        assert hasattr(fastkv, name)
