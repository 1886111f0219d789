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


@pytest.mark.parametrize("window", [8, 1, 0])
def test_the_pages_policy_keeps_the_shortest_keys(tiny_llm: LLM, page: dict[str, Any], window: int) -> None:
    full = tiny_llm.prefill(PROMPT, FullKV())
    ours = tiny_llm.prefill(PROMPT, page["KNorm"](kept=0.2, window=window))
    for layer in (0, 3, 5):
        for head in (0, 1):
            kept = ours.kept[layer][0, head].tolist()
            lengths = [float(key.double().norm()) for key in full.cache.read(layer)[0].k[0, head]]
            dropped = [length for token, length in enumerate(lengths) if token not in kept]
            assert max(lengths[token] for token in kept[: 60 - window]) < min(dropped) + 1e-5
            assert kept[60 - window :] == list(range(300 - window, 300))


def test_the_library_takes_any_policy(tiny_folder: Path, tiny_llm: LLM, page: dict[str, Any]) -> None:
    policy: Policy = page["KNorm"](kept=0.5)
    assert policy.name == "knorm"
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
