"""The benchmark measures what it says: its cost model, its peer, and its table. No figure here is a limit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from torch.utils.flop_counter import FlopCounterMode

from fastkv import LLM, FastKV, FastKVError, FullKV
from fastkv.cache.policy import plan_layers
from fastkv.models.presets import PRESETS


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cost
    import latency

    yield type("Modules", (), {"cost": cost, "latency": latency})
    for name in ("cost", "latency", "peer"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def dummy(archive_folder: Path) -> LLM:
    return LLM(archive_folder, dtype="float32", device="cpu", load_format="dummy")


def test_bytes_of_a_decode_step_of_llama_31(benchmarks: Any) -> None:
    """15.0 GB of weights, 131 072 B of cache a token, and so what a tenth of the cache can gain at most."""
    config = PRESETS["llama-3.1-8b"]
    gains = []
    for context in (0, 8192, 32_768, 131_072):
        full, tenth = (
            benchmarks.cost.decode_bytes(config, plan_layers(policy, 32, context), 0, 2)
            for policy in (FullKV(), FastKV())
        )
        gains.append(round(full / tenth, 2))
        if context == 0:
            weights = full
        assert full - weights == context * 131_072
    assert round(weights / 1e9, 1) == 15.0
    assert gains == [1.0, 1.06, 1.25, 1.92]


def test_operations_of_a_prefill_are_those_that_torch_counts(benchmarks: Any, dummy: LLM) -> None:
    """All but those of attention, which torch does not count on a CPU: half a square a layer, one row in the last."""
    ids = list(range(3, 503))
    with FlopCounterMode(display=False) as counter:
        dummy.prefill(ids, FullKV())
    config = dummy.config
    expected = benchmarks.cost.prefill_flops(config, plan_layers(FullKV(), config.n_layers, len(ids)))
    attention = 4 * config.n_heads * config.head_dim * (7 * 500 * 250 + 500)
    assert counter.get_total_flops() == pytest.approx(expected - attention, rel=1e-4)


def test_tsp_saves_what_the_paper_says_at_most(benchmarks: Any) -> None:
    """Behind layer 15 of 32 a fifth of the tokens goes on: nearly half of the work at most, less of it when short."""
    config = PRESETS["llama-3.1-8b"]
    gains = [
        benchmarks.cost.prefill_flops(config, plan_layers(FullKV(), 32, context))
        / benchmarks.cost.prefill_flops(config, plan_layers(FastKV(), 32, context))
        for context in (8192, 32_768, 131_072)
    ]
    assert sorted(gains) == gains
    assert 1.65 < gains[0] < gains[-1] < 2.0


def test_the_peer_is_the_same_model(benchmarks: Any, dummy: LLM) -> None:
    pytest.importorskip("transformers")
    from peer import hf_model

    ids = torch.arange(3, 90).unsqueeze(0)
    with torch.inference_mode():
        theirs = hf_model(dummy)(ids).logits[:, -1]
    torch.testing.assert_close(dummy.prefill(ids, FullKV()).logits, theirs, atol=1e-3, rtol=1e-3)


def test_a_small_run(benchmarks: Any, archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(archive_folder), "--context", "200", "300", "--rounds", "2", "--new-tokens", "4"]
    monkey = benchmarks.cost.Ceilings(1e12, 1e11)
    benchmarks.latency.measure_ceilings = lambda device, dtype: monkey
    assert benchmarks.latency.main([*argv, "--json", str(tmp_path / "out.json")]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in table[1:]] == [
        ["| 200", "full"],
        ["| 200", "fastkv"],
        ["| 300", "full"],
        ["| 300", "fastkv"],
    ]
    written = json.loads((tmp_path / "out.json").read_text())
    row = written["rows"][0]
    assert row["prefill_to_full"] == row["decode_to_full"] == 1.0
    assert len(row["samples"]) == 2
    assert row["ttft_range"][0] <= row["ttft_s"] <= row["ttft_range"][1]
    assert "--context 200 300" in written["command"]


def test_dummy_weights(dummy: LLM, archive_folder: Path, tmp_path: Path) -> None:
    """From a configuration alone, the same for the same seed, and never under the name of real ones."""
    (tmp_path / "config.json").write_text((archive_folder / "config.json").read_text())
    again = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    assert torch.equal(again.prefill([5, 6, 7]).logits, dummy.prefill([5, 6, 7]).logits)
    assert dummy.prefill([5, 6, 7]).logits.std() > 0.1
    with pytest.raises(FastKVError, match="no such folder"):
        LLM("llama-100m", device="cpu")
    with pytest.raises(FastKVError, match="load_format"):
        LLM(tmp_path, device="cpu", load_format="random")


def test_presets_are_the_published_sizes() -> None:
    from fastkv.models.weights import model_bytes

    millions = {name: round(model_bytes(config, torch.int8) / 1e6) for name, config in PRESETS.items()}
    assert millions == {"llama-3.1-8b": 8030, "llama-3.2-1b": 1236, "llama-100m": 125}
