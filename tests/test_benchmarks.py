"""The benchmark measures what it says: its cost model, its peer, and its table. No figure here is a limit."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import ROOT
from torch.utils.flop_counter import FlopCounterMode

from fastkv import LLM, AdaKV, FastKV, FastKVError, FullKV, GemFilter, SamplingParams
from fastkv.cache import scores
from fastkv.cache.policy import LayerPlan, plan_layers
from fastkv.engine import attention, prefill
from fastkv.engine.cost import decode_bytes, first_pass_flops, prefill_flops
from fastkv.engine.step import Caches, EagerStepper
from fastkv.kernels import key_products, products
from fastkv.models.presets import PRESETS


@pytest.fixture
def run(benchmarks: Any, archive_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command on the bundled model, with ceilings of its own making."""
    monkeypatch.setattr(benchmarks.cost, "measure_ceilings", lambda device, dtype: benchmarks.cost.Ceilings(1e12, 1e11))
    small = ["--model", str(archive_folder), "--rounds", "2", "--new-tokens", "4", "--device", "cpu"]
    return lambda *argv: benchmarks.latency.main([*small, *map(str, argv)])


@pytest.fixture(scope="module")
def dummy(archive_folder: Path) -> LLM:
    return LLM(archive_folder, dtype="float32", device="cpu", load_format="dummy")


def test_bytes_of_a_decode_step_of_llama_31(benchmarks: Any) -> None:
    """15.0 GB of weights, 131 072 B of cache a token, and so what a tenth of the cache can gain at most."""
    config = PRESETS["llama-3.1-8b"]
    gains = []
    for context in (0, 8192, 32_768, 131_072):
        full, tenth = (decode_bytes(config, plan_layers(policy, 32, context), 0, 2) for policy in (FullKV(), FastKV()))
        gains.append(round(full / tenth, 2))
        if context == 0:
            weights = full
        assert full - weights == context * 131_072
    assert round(weights / 1e9, 1) == 15.0
    assert gains == [1.0, 1.06, 1.25, 1.92]


@pytest.mark.parametrize("batch", [1, 3])
def test_operations_of_a_prefill_are_those_that_torch_counts(
    benchmarks: Any, dummy: LLM, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those of attention, which torch does not count on a CPU: half a square a layer, one row in the last.

    Nor does it count products by oneDNN, so there are none here.
    """
    monkeypatch.setattr(products, "SMALLEST", 2**40)
    ids = torch.arange(3, 503).expand(batch, -1)
    with FlopCounterMode(display=False) as counter:
        dummy.prefill(ids, FullKV())
    config = dummy.config
    expected = prefill_flops(config, plan_layers(FullKV(), config.n_layers, ids.shape[1]), batch)
    attention = batch * 4 * config.n_heads * config.head_dim * (7 * 500 * 250 + 500)
    assert counter.get_total_flops() == pytest.approx(expected - attention, rel=1e-4)


def test_operations_of_a_first_pass_are_those_that_torch_counts(dummy: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 2**40)
    config, policy = dummy.config, GemFilter(filter_layer=3, kv_len=50)
    with FlopCounterMode(display=False) as counter:
        dummy.prefill(list(range(3, 503)), policy)
    expected = prefill_flops(config, plan_layers(policy, config.n_layers, 500)) + first_pass_flops(config, 3, 500)
    attention = 4 * config.n_heads * config.head_dim * (3 * 500 * 250 + 7 * 50 * 25 + 50)
    query = 2 * config.hidden_size * config.n_heads * config.head_dim + 2 * config.n_heads * config.head_dim * 500
    assert counter.get_total_flops() == pytest.approx(expected - attention + query, rel=1e-4)


def test_the_cost_of_two_layers_counted_by_hand(benchmarks: Any) -> None:
    """Layer 0 sees 6 tokens, keeps 3 and sends 4 on; layer 1 keeps 2. Weights are read once for all of a batch."""
    small: dict[str, Any] = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "n_layers": 2, "n_heads": 2}
    config = replace(PRESETS["llama-100m"], **small, n_kv_heads=1, head_dim=4)
    plans = [LayerPlan(seen=6, kept=3, propagated=4), LayerPlan(seen=4, kept=2, propagated=None)]
    keys, queries, mlp = 2 * 4 * 8, 2 * 8 * 8, 3 * 8 * 16
    first = 2 * 6 * keys + 2 * 4 * (queries + mlp) + 4 * 4 * (6 // 2) * 8
    second = 2 * 4 * keys + 2 * 1 * (queries + mlp) + 4 * 1 * 4 * 8
    head = 2 * 10 * 8
    assert (first, second, head) == (5248, 1664, 160)
    assert [prefill_flops(config, plans, batch) for batch in (1, 3)] == [7072, 3 * 7072]
    weights = 2 * (64 + 128 + 384) + 10 * 8
    cache = 2 * 4 * ((3 + 1) + (2 + 1))  # after one token more: K and V of 4 values each
    assert (weights, cache) == (1232, 56)
    assert decode_bytes(config, plans, 1, 2) == 2 * (weights + cache)
    assert decode_bytes(config, plans, 1, 2, batch=3) == 2 * (weights + 3 * cache)


def test_tsp_saves_what_the_paper_says_at_most(benchmarks: Any) -> None:
    """After layer 15 of 32 a fifth of the tokens is propagated: at most nearly half of the work, less when short."""
    config = PRESETS["llama-3.1-8b"]
    gains = [
        prefill_flops(config, plan_layers(FullKV(), 32, context))
        / prefill_flops(config, plan_layers(FastKV(), 32, context))
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


def test_the_peer_goes_on_as_its_own_model_would(benchmarks: Any, dummy: LLM) -> None:
    """Several prompts at a time, greedy: the tokens are those of a forward pass over everything so far."""
    pytest.importorskip("transformers")
    start, step = benchmarks.peer.transformers_peer(dummy)
    ids = torch.arange(3, 63).view(3, 20)
    state = start(ids)
    for _ in range(3):
        with torch.inference_mode():
            expected = benchmarks.peer.hf_model(dummy)(ids).logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(state[0], expected)
        ids = torch.cat([ids, state[0]], dim=1)
        state = step(state)


def test_greedy_counts_the_tokens_of_all_sequences(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks when work is done: 5 s for the first tokens, 2 s for each of the 3 steps after them."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(benchmarks.runners, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def work(seconds: float, result: int) -> int:
        clock.now += seconds
        return result

    states = []

    def step(state: int) -> int:
        states.append(state)
        return work(2, 10 * state)

    sample = benchmarks.runners.greedy(lambda: work(5, 1), step, torch.device("cpu"), 7, 4)
    assert (sample.ttft_s, sample.decode_tokens_per_s, sample.total_s) == (5, 7 * 3 / 6, 11)
    assert states == [1, 10, 100]


def figures(ttft: float, seconds: float, **others: Any) -> SimpleNamespace:
    """The metrics of a prompt that got 4 tokens, the last three of them in `seconds`."""
    return SimpleNamespace(ttft_s=ttft, decode_tokens_per_s=3 / seconds, new_tokens=4, **others)


def test_prompts_that_decode_together_are_counted_from_the_last_first_token(benchmarks: Any) -> None:
    """First tokens after 5, 5.25 and 5.5 s, and the last ones after 11, 11.25 and 11.5 s: 9 tokens in 6 s."""
    each = [
        figures(ttft, 6.0, kv_bytes=size, peak_bytes=peak)
        for ttft, size, peak in ((5.0, 100, 900), (5.5, 30, 950), (5.25, 7, None))
    ]
    sample = benchmarks.runners.together(each)
    assert (sample.ttft_s, sample.decode_tokens_per_s, sample.total_s) == (5.5, 9 / 6, 11.5)
    assert (sample.kv_bytes, sample.peak_bytes) == (137, 950)


def test_prompts_that_did_not_fit_together_are_not_passed_off_as_a_batch(benchmarks: Any) -> None:
    with pytest.raises(FastKVError, match=r"--batch 2: not all .* take fewer"):
        benchmarks.runners.together([figures(1.0, 2.0), figures(3.5, 2.0)])


def test_a_batch_is_what_users_get(benchmarks: Any, dummy: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts at a time, each prefilled on its own: a decode step is of as many sequences as there are."""
    seen: list[int] = []
    step = EagerStepper.step

    def counted(self: EagerStepper, caches: Caches) -> None:
        seen.append(len(caches))
        step(self, caches)

    monkeypatch.setattr(EagerStepper, "step", counted)
    sample = benchmarks.runners.engine(dummy, FullKV())(torch.arange(3, 123).view(12, 10), 5)
    assert seen == [12] * 4
    assert sample.kv_bytes == 12 * dummy.generate(list(range(3, 13)), SamplingParams(max_tokens=5)).metrics.kv_bytes


def test_every_context_and_batch_has_its_rows(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--context", 100, 150, "--batch", 3, 1, "--json", tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    order = [[n, b, name] for n in ("100", "150") for b in ("1", "3") for name in ("full", "fastkv")]
    assert [cells[:3] for cells in table[1:]] == order
    assert {len(cells) for cells in table} == {14}
    written = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["context"], row["batch"], row["name"]): row for row in written["rows"]}
    assert len(rows) == 8
    for (context, batch, name), row in rows.items():
        assert row["kv_bytes"] == batch * rows[context, 1, name]["kv_bytes"]
        assert row["peak_bytes"] == max(sample["peak_bytes"] for sample in row["samples"])
        full = rows[context, batch, "full"]
        assert row["total_to_full"] == full["total_s"] / row["total_s"]
        assert row["prefill_to_full"] == full["ttft_s"] / row["ttft_s"]
        assert row["decode_to_full"] == row["decode_tokens_per_s"] / full["decode_tokens_per_s"]
        alone = rows[context, 1, name]
        assert row["decode_to_one"] == row["decode_tokens_per_s"] / alone["decode_tokens_per_s"]
        assert len(row["samples"]) == 2
        for key, span in (
            ("ttft_s", "ttft_range"),
            ("decode_tokens_per_s", "decode_range"),
            ("total_s", "total_range"),
        ):
            assert row[span] == [f(sample[key] for sample in row["samples"]) for f in (min, max)]
            assert row[span][0] <= row[key] <= row[span][1]
        for sample in row["samples"]:
            decoding = batch * 3 / sample["decode_tokens_per_s"]
            assert sample["total_s"] == pytest.approx(sample["ttft_s"] + decoding, rel=1e-9)
    assert "--context 100 150 --batch 3 1" in written["command"]
    assert (written["rounds"], written["new_tokens"], written["weights"]) == (2, 4, "stored")


def test_a_batch_without_one_prompt_to_compare_with(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--context", 200, "--batch", 2, "--policy", "fastkv") == 0
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[8] == "–"


def test_shares_of_the_ceilings(benchmarks: Any, dummy: LLM) -> None:
    """2 s for the first tokens of 3 prompts, and 10 steps a second."""
    ceilings = benchmarks.cost.Ceilings(1e12, 1e11)
    samples = [benchmarks.runners.Sample(2.0, 30.0, 3.0, 100, peak) for peak in (200, 900, 300)]
    (row,) = benchmarks.table.summarise({"full": samples}, dummy, ceilings, 500, 3, 8)
    plans = plan_layers(FullKV(), dummy.config.n_layers, 500)
    flops = prefill_flops(dummy.config, plans, 3)
    read = decode_bytes(dummy.config, plans, 4, 4, 3)
    assert row["prefill_of_ceiling"] == pytest.approx(flops / 2 / 1e12)
    assert row["decode_of_ceiling"] == pytest.approx(10 * read / 1e11)
    assert row["peak_bytes"] == 900


def test_a_folders_own_weights_are_used(benchmarks: Any, archive_llm: LLM, dummy: LLM, archive_folder: Path) -> None:
    argv = ["--model", str(archive_folder), "--dtype", "float32", "--device", "cpu", "--context", "20"]
    llm, weights = benchmarks.latency.load(benchmarks.latency.parser().parse_args(argv))
    assert weights == "stored"
    assert torch.equal(llm.prefill([5, 6, 7]).logits, archive_llm.prefill([5, 6, 7]).logits)
    assert not torch.equal(llm.prefill([5, 6, 7]).logits, dummy.prefill([5, 6, 7]).logits)


def test_the_head_says_what_the_rows_are(
    run: Callable[..., int], archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--context", 200, "--dtype", "float32") == 0
    head = capsys.readouterr().out.split("|")[0]
    words = ("stored weights", "float32", torch.__version__, "1,000 GFLOP/s", "100.0 GB/s", "2 of each", "4 new tokens")
    for word in (*words, "policy full), same context and batch"):
        assert word in head, word
    (tmp_path / "config.json").write_text((archive_folder / "config.json").read_text())
    assert run("--context", 200, "--model", tmp_path, "--policy", "fastkv") == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    assert "policy full was not measured" in out
    assert out.splitlines()[-1].split(" | ")[4] == "–"  # × full


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--context", "0"], "--context must be a whole number of at least 1, not 0"),
        (["--context", "x"], "--context"),
        (["--context", "200000"], "--context 200000"),
        (["--rounds", "0"], "--rounds"),
        (["--batch", "1", "0"], "--batch"),
        (["--warm-ups", "-1"], "--warm-ups"),
        (["--attention", "fast"], "attention must be one of "),
        (["--new-tokens", "1"], "--new-tokens must be a whole number of at least 2"),
        (["--threads", "0"], "--threads"),
        (["--policy", "half"], "--policy must be one of "),
        (["--json", "missing/out.json"], "missing/out.json: cannot be written"),
        (["--json", "."], ".: cannot be written"),
        (["--plot", "missing/out.png"], "missing/out.png: cannot be written"),
        (["--json", "out.json", "--plot", "missing/out.png"], "missing/out.png: cannot be written"),
        (["--plot", "out.svg"], "out.svg: the plot is a PNG"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    argv: list[str],
    named: str,
    benchmarks: Any,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks.runners, "measure", lambda *_: pytest.fail("the run began"))
    assert run(*argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("latency.py: error: ")
    assert named in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_breaks_off_leaves_what_it_has(
    benchmarks: Any, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmarks.runners.measure

    def out_of_memory(runs: Any, prompts: Any, *rest: Any) -> Any:
        ids = next(prompts)
        if ids.shape[1] == 300:
            raise FastKVError("out of memory")
        return measure(runs, iter([ids] * 9), *rest)

    monkeypatch.setattr(benchmarks.runners, "measure", out_of_memory)
    assert run("--context", 200, 300, "--json", tmp_path / "out.json") == 2
    assert {row["context"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]} == {200}


def png_size(path: Path) -> tuple[int, int]:
    """Width and height as the file's own header says them."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert head[12:16] == b"IHDR"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_the_plot_of_a_run(run: Callable[..., int], tmp_path: Path) -> None:
    """A row of panels for each batch, and everyone's colour in it."""
    pytest.importorskip("matplotlib")
    import numpy as np
    from PIL import Image

    heights = []
    for batches in ([1], [1, 2]):
        path = tmp_path / f"{len(batches)}.png"
        assert run("--context", 100, 200, "--batch", *batches, "--rounds", 1, "--plot", path) == 0
        width, height = png_size(path)
        assert width == 1500
        heights.append(height)
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=int)
        for colour in ((0x1B, 0x1B, 0x1B), (0x00, 0x72, 0xB2)):
            for panel in (pixels[:, :750], pixels[:, 750:]):
                assert (
                    abs(panel - colour).sum(-1) < 10
                ).sum() > 100  # one line may cover a part of another: they stand where the clock puts them
    assert heights == [675, 1245]


def test_what_a_panel_shows(benchmarks: Any) -> None:
    """Medians in the order of the contexts, bars from the lowest to the highest run, and only the panel's own batch."""
    pytest.importorskip("matplotlib")
    rows = [
        {"context": context, "batch": batch, "name": name, "ttft_s": 3.0 * batch, "ttft_range": [2.0, 7.0]}
        | {"decode_tokens_per_s": context / 1000 + batch, "decode_range": [0.5, 99.5]}
        for context in (8192, 2048, 4096)
        for batch in (2, 1)
        for name in ("full", "fastkv")
    ]
    about = {"model": "llama-100m", "dtype": "bfloat16", "device": "some device", "date": "2026-11-21"}
    figure = benchmarks.plot.figure_of({**about, "rows": rows})
    assert figure.get_suptitle() == "llama-100m, bfloat16 on some device, 2026-11-21"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full", "fastkv"]
    for axes, batch, ttft in zip(figure.axes, (1, 1, 2, 2), (True, False, True, False), strict=True):
        assert axes.get_ylabel() == f"{'time to first token, s' if ttft else 'decoding, tokens/s'} (batch {batch})"
        assert axes.get_xlabel().startswith("context length, tokens")
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2K", "4K", "8K"]
        assert axes.xaxis.get_transform().base == 2
        for drawn in axes.containers:
            line, _, (bars,) = drawn
            x, y = line.get_data()
            assert list(x) == [2048, 4096, 8192]
            assert list(y) == ([3.0 * batch] * 3 if ttft else [context / 1000 + batch for context in x])
            spans = [bar[:, 1].tolist() for bar in bars.get_segments()]
            assert spans == [pytest.approx([2.0, 7.0] if ttft else [0.5, 99.5])] * 3


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-cpu-*.json"))


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_the_saved_results_are_drawn(result: Path, benchmarks: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert benchmarks.plot.main([str(result), str(tmp_path / "out.png")]) == 0
    assert png_size(tmp_path / "out.png") == (1500, 1245 if "batch" in result.stem else 675)


def test_a_saved_result_of_before_there_were_batches_is_drawn(benchmarks: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saved = json.loads(next(path for path in RESULTS if "batch" not in path.stem).read_text())
    for row in saved["rows"]:
        del row["batch"]
    (tmp_path / "old.json").write_text(json.dumps(saved))
    assert benchmarks.plot.main([str(tmp_path / "old.json"), str(tmp_path / "out.png")]) == 0
    assert png_size(tmp_path / "out.png") == (1500, 675)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[1]", "no result"),
        ('{"rows": []}', "no result"),
        ("\xff", "no JSON"),
    ],
)
def test_what_is_no_result_is_not_drawn(
    text: str | None, named: str, benchmarks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    if text is not None:
        (tmp_path / "in.json").write_bytes(text.encode("latin-1"))
    assert benchmarks.plot.main([str(tmp_path / "in.json"), str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plot.py: error: ")
    assert named in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("flag", "package"), [("--plot=out.png", "matplotlib"), ("--peer=transformers", "transformers")]
)
def test_a_missing_package_is_one_line(
    flag: str,
    package: str,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run("--context", 200, flag) == 2
    error = capsys.readouterr().err
    assert 'pip install "fastkv[' in error
    assert len(error.splitlines()) == 1


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
    assert millions == {
        "llama-3.1-70b": 70_554,
        "qwen3-32b": 32_762,
        "qwen2.5-7b": 7616,
        "llama-3.1-8b": 8030,
        "llama-3.2-1b": 1236,
        "llama-100m": 125,
    }


@pytest.mark.parametrize("warm_ups", [0, 2])
def test_warm_ups_run_and_do_not_count(benchmarks: Any, warm_ups: int) -> None:
    seen: list[torch.Tensor] = []

    def once(ids: torch.Tensor, new_tokens: int) -> Any:
        seen.append(ids)
        return benchmarks.runners.Sample(1.0, float(len(seen)), 2.0)

    prompts = benchmarks.runners.random_prompts(50, 30, 2)
    samples = benchmarks.runners.measure({"one": once}, prompts, 4, 3, warm_ups)
    assert [sample.decode_tokens_per_s for sample in samples["one"]] == [warm_ups + 1, warm_ups + 2, warm_ups + 3]
    assert {tuple(ids.shape) for ids in seen} == {(2, 30)}
    assert len({ids.sum().item() for ids in seen}) == len(seen)  # other tokens each time
    again = next(benchmarks.runners.random_prompts(50, 30, 2))
    assert torch.equal(seen[0], again)


def test_a_peak_holds_no_other_policys_memory(benchmarks: Any) -> None:
    """Policies that take turns share one pool, and the largest would be the peak of all."""
    pool: list[int] = []

    def runner(size: int) -> Any:
        def run(ids: torch.Tensor, new_tokens: int) -> Any:
            pool.append(size)
            return benchmarks.runners.Sample(1.0, 1.0, 1.0, peak_bytes=sum(pool))

        return run

    runs, prompts = {"full": runner(100), "fastkv": runner(10)}, benchmarks.runners.random_prompts(50, 30, 1)
    for warm_ups, peaks in ((1, {"full": 100, "fastkv": 10}), (0, {"full": None, "fastkv": None})):
        samples = benchmarks.runners.measure(runs, prompts, 4, 2, warm_ups, pool.clear)
        assert {name: {each.peak_bytes for each in taken} for name, taken in samples.items()} == {
            name: {peak} for name, peak in peaks.items()
        }


@pytest.mark.parametrize(("more", "size"), [([], "fastkv, 300 tokens"), (["--batch", "3"], "fastkv, 3 x 300 tokens")])
def test_where_the_time_goes(
    more: list[str], size: str, benchmarks: Any, archive_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(archive_folder), "--context", "300", "--new-tokens", "5", "--top", "3", "--device", "cpu"]
    argv += more
    assert benchmarks.operations.main(argv) == 0
    out = capsys.readouterr().out
    assert size in out
    assert "\nprefill: " in out
    assert "\n2 decode steps: " in out
    rows = [line for line in out.splitlines() if line.startswith("| ") and " % | " in line]
    assert len(rows) == 6
    assert any("aten::" in row for row in rows)
    assert benchmarks.operations.main([*argv, "--policy", "half"]) == 2
    assert "--policy must be one of" in capsys.readouterr().err


def test_calibration_of_the_attention_mass(benchmarks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only of examples that the full cache answers right; the threshold comes from the even ones alone."""
    scores = [(0, 0.9, 1), (0, 0.3, 0), (2, 0.8, 1), (2, 0.5, 0), (1, 0.9, 1), (1, 0.95, 0), (1, 0.2, 0), (3, 0.99, 0)]
    records = [
        {"id": str(index), "policy": "fastkv", "index": index, "score": score, "attention_kept": share}
        for index, share, score in scores
    ]
    records += [{"id": str(i), "policy": "full", "index": i, "score": i < 3, "attention_kept": 1.0} for i in range(4)]
    records = [{"task": "niah_single", **record} for record in records]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"format": "fastkv-eval 1"}, *records])) + "\n")
    assert benchmarks.mass_calibration.main([str(path)]) == 0
    threshold, even, odd = capsys.readouterr().out.splitlines()
    assert threshold == "threshold 0.55"
    assert "2 of 4 right; ROC area 1.00; warned of 100% of the wrong and 0% of the right answers" in even
    assert "1 of 3 right; ROC area 0.50; warned of 50% of the wrong and 0% of the right answers" in odd
    path.with_name("b.jsonl").write_bytes(path.read_bytes())
    capsys.readouterr()
    assert benchmarks.mass_calibration.main([str(path), str(path.with_name("b.jsonl")), "--threshold", "0.3"]) == 0
    named, *_, even, odd = capsys.readouterr().out.splitlines()
    told = "warned of {}% of the wrong and 0% of the right answers"
    assert named == "threshold 0.30"
    assert even == f"all, even examples: 4 of 8 right; ROC area 1.00; {told.format(0)}"
    assert odd == f"all, odd examples: 2 of 6 right; ROC area 0.50; {told.format(50)}"
    assert benchmarks.mass_calibration.main([str(path), "--threshold", "1"]) == 0
    assert capsys.readouterr().out.count("warned of 100% of the wrong and 100% of the right answers") == 2
    assert benchmarks.mass_calibration.main([str(path), "--threshold", "85"]) == 2
    assert "threshold must be" in capsys.readouterr().err
    path.write_text("{}\n")
    assert benchmarks.mass_calibration.main([str(path)]) == 2
    assert "has no answer with attention_kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON\n",
        "{}\n[]\n",
        "{}\n3\n",
        '{}\n"id policy score"\n',
        '{}\n{"id": 1, "policy": "full", "score": 1, "index": 0}\n',
        None,
    ],
)
def test_what_is_no_file_of_answers_is_refused(benchmarks: Any, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "answers.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(FastKVError, match=rf"{file}: is no file of fastkv-eval"):
        benchmarks.answers.read_answers(file)


def test_the_ablation_continues_and_tells_every_setting(
    benchmarks: Any, archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(benchmarks.ablation, "POLICIES", {"full": "full", "values=no": "fastkv:values=no"})
    words = ["ablation.py", str(tmp_path), "--model", str(archive_folder), "--task", "archive", "--no-chat"]
    monkeypatch.setattr(sys, "argv", [*words, "--length", "128"])
    assert benchmarks.ablation.main() == 0
    first = capsys.readouterr().out
    assert first.endswith("|  | model, archive 128 lead (5) |\n| --- | --- |\n" + first[first.rindex("| full |") :])
    (file,) = tmp_path.glob("*.jsonl")
    asked = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert {one["policy"] for one in asked} == {"full", "fastkv:values=no,min_tokens=1"}
    right = sum(one["score"] for one in asked if one["policy"] == "full")
    assert f"| full | {100 * right / 5:.1f} |" in first
    # An example that not every setting has answered yet does not count.
    asked[-1]["score"] = 1 - asked[-1]["score"]
    file.write_text("\n".join([file.read_text().splitlines()[0], *map(json.dumps, asked[:-1])]) + "\n")
    assert "archive 128 lead (4)" in benchmarks.ablation.table(tmp_path)
    assert benchmarks.ablation.main() == 0
    assert capsys.readouterr().out[-200:] == first[-200:], "the run did not continue"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert benchmarks.ablation.table(tmp_path) == "Nothing has been answered yet.\n", "a run that has just begun"
    file.write_text("{}\n[]\n")
    with pytest.raises(FastKVError, match="no file of fastkv-eval"):
        benchmarks.ablation.table(tmp_path)


def test_what_choosing_costs(benchmarks: Any, archive_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(archive_folder), "--context", "400", "--rounds", "1", "--device", "cpu"]
    assert benchmarks.selection.main(argv) == 0
    out = capsys.readouterr().out
    assert "400 tokens: selection " in out
    select, layer = (float(word) for word in re.findall(r"([0-9.]+) ms", out))
    assert 0 < select < layer


def test_how_long_a_process_takes(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kinds in turn, and the first run of each does not count."""
    commands: list[list[str]] = []

    def timed(command: list[str]) -> tuple[float, float]:
        commands.append(command)
        number = len(commands)
        return (99.0, 99.0) if number <= 4 else (number / 10, number)

    monkeypatch.setattr(benchmarks.startup, "timed", timed)
    assert benchmarks.startup.main(["--model", "m", "--prompt", "p", "--rounds", "3"]) == 0
    flags = [tuple(command[command.index("--quiet") + 1 :]) for command in commands]
    assert flags == list(benchmarks.startup.KINDS) * 4
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0] == "| `(none)` | 0.9 (0.5 – 1.3) | 9.0 (5.0 – 13.0) |"
    assert lines[3] == "| `--weights int8 --compile` | 1.2 (0.8 – 1.6) | 12.0 (8.0 – 16.0) |"


def test_a_process_that_fails_is_no_figure(benchmarks: Any) -> None:
    first, whole = benchmarks.startup.timed([sys.executable, "-c", "print('x')"])
    assert 0 < first <= whole
    with pytest.raises(FastKVError, match="fastkv-run failed: no such thing"):
        benchmarks.startup.timed([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_who_multiplies(benchmarks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Few rows with every matrix, many rows with those of a prefill, each way that works; one row beside memory."""
    choices = benchmarks.choices
    monkeypatch.setattr(choices, "SHAPES", ((32, 24), (80, 24)))
    monkeypatch.setattr(choices, "BYTES", 2**14)
    monkeypatch.setattr(choices, "MANY", 64)
    monkeypatch.setattr(choices, "READ", {"memory": torch.ones(2**12)})
    monkeypatch.setattr(choices, "ways_of", lambda dtype: {"linear": torch.nn.functional.linear, "split": max})
    monkeypatch.setattr(choices, "compiled_product", lambda: max)
    monkeypatch.setattr(choices, "multiply", lambda *_: None)
    choices.products(torch.float32)
    lines = capsys.readouterr().out.splitlines()
    one = r"linear [\d.]+ \(\d+%\), split [\d.]+ \(\d+%\), compiled [\d.]+ \(\d+%\), memory [\d.]+ \(100%\) GB/s"
    for line, about in zip(
        lines,
        (
            f"1 x [32, 24]: {one}",
            r"2 x [32, 24]: linear [\d.]+ GB/s",
            r"4 x [32, 24]: linear [\d.]+ GB/s",
            r"8 x [32, 24]: linear [\d.]+ GB/s",
            r"32 x [32, 24]: linear [\d.]+ GB/s",
            r"64 x [32, 24]: linear [\d.]+ GFLOP/s",
            f"1 x [80, 24]: {one}",
            r"2 x [80, 24]: linear [\d.]+ GB/s",
            r"4 x [80, 24]: linear [\d.]+ GB/s",
            r"8 x [80, 24]: linear [\d.]+ GB/s",
            r"32 x [80, 24]: linear [\d.]+ GB/s",
        ),
        strict=True,
    ):
        shape, _, rest = about.partition(": ")
        assert re.fullmatch(f"float32 {re.escape(shape)}: {rest}", line), line


SUITE = ["--device", "cpu", "--scale", "0.001", "--model"]


def test_the_suite_for_a_gpu_runs_anywhere(
    benchmarks: Any,
    archive_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each figure says what ran; a case that fails, or that has no time left, is told and ends nothing."""
    argv = ["--out", str(tmp_path), *SUITE, str(archive_folder), "--steps"]
    steps = ["ceilings", "decode", "first", "tsp-layer", "padding", "scores", "profiles", "million"]
    monkeypatch.setattr(benchmarks.gpu_suite, "gc", SimpleNamespace(collect=lambda: None))  # slow among so many tests
    shares = [benchmarks.operations.Share("mm", 3, 1.0), benchmarks.operations.Share("add", 5, 0.5)]
    monkeypatch.setattr(benchmarks.suite_steps, "profiled", lambda work, device: (work(), (2.0, shares))[1])
    monkeypatch.setattr(benchmarks.synthetic, "decode", partial(benchmarks.synthetic.decode, steps=6))
    monkeypatch.setattr(benchmarks.synthetic, "_UNCOUNTED", 2)
    before = list(sys.path)
    assert benchmarks.gpu_suite.main([*argv, *steps]) == 0
    assert sys.path == before
    printed = capsys.readouterr().out
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-gpu-suite.json"))
    assert (saved["torch"], saved["weights"]) == (torch.__version__, "random")
    assert "--steps ceilings decode" in saved["command"]
    figures = {(each["step"], each["case"]): each for each in saved["figures"]}
    assert {step for step, _ in figures} == set(steps)
    several = figures["decode", "fastkv 128K x 4"]
    assert (several["status"], several["batch"], several["context"], several["graphs"]) == ("done", 4, 131, False)
    assert len(several["intervals_ms"]) == 6
    assert several["tokens_per_s"] == pytest.approx(4e3 / several["step_ms"])
    copy = figures["ceilings", "copy"]["bytes_per_s"]
    assert several["of_copy"] == pytest.approx(several["gb_per_s"] * 1e9 / copy)
    assert figures["first", "full 8K auto"]["attention"].startswith("flash_attention x ")
    assert (figures["first", "full 8K cudnn"]["status"], figures["million", "512K"]["status"]) == ("failed", "skipped")
    layer = figures["tsp-layer", "attention 128K by chance"]
    assert (layer["context"], layer["merged"]) == (131, "a mask is as fast on a CPU")
    assert layer["propagated"] in (26, 27)  # the last token is one of them, or comes to them
    assert 0 < layer["difference"] < 0.02
    assert figures["tsp-layer", "attention 64K in passages"]["context"] == 66
    assert figures["tsp-layer", "fastkv 128K all tokens"]["status"] == "done"
    assert figures["padding", "fastkv 4K cudnn padded"]["status"] == "failed"
    assert (figures["padding", "fastkv 32K flash"]["status"], figures["padding", "cudnn 8K attention"]["status"]) == (
        "done",
        "failed",
    )
    scored = figures["scores", "1,000,000"]
    assert (scored["context"], scored["float32_products"], scored["difference"]) == (1000, False, 0)
    profile = figures["profiles", "prefill fastkv 8K"]
    assert (profile["idle_share"], profile["calls"], len(profile["kernels"])) == (0.25, 8, 2)
    assert "million | 1,000 first token | running: ttft_s" in printed
    assert printed.splitlines()[-1].startswith("done after ")

    assert benchmarks.gpu_suite.main([*argv, "ceilings", "--deadline", "0"]) == 0
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-gpu-suite.json"))
    assert {each["status"] for each in saved["figures"]} == {"skipped"}
    assert benchmarks.gpu_suite.main([*argv, "everything"]) == 2
    assert "a step must be one of tests, ceilings" in capsys.readouterr().err


def test_what_is_new_is_measured_beside_what_it_replaces(
    benchmarks: Any, dummy: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where functions with the meaning of a GPU's stand in: which way ran, and that both give the same."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    ran: list[str] = []
    bmm = torch.bmm

    def into_float32(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        ran.append("products")
        return bmm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", into_float32)
    for module in (key_products, scores, benchmarks.layer_pairs):
        monkeypatch.setattr(module, "has_float32_products", lambda *_: True)
    found = benchmarks.layer_pairs.window_scores(500, dummy.config, device, dtype)
    assert (found["float32_products"], ran) == (True, ["products"] * 5)  # one run more than those that are timed, twice
    assert found["difference"] < 1e-5

    lengths: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def by_cudnn(q: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        lengths.append(q.shape[2])
        return attend(q, *rest, **more)

    monkeypatch.setattr(attention, "sdpa_kernel", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", by_cudnn)
    found = benchmarks.layer_pairs.new_lengths(1300, dummy.config, device, dtype)
    assert lengths == [1298, 1294, 1290, *[1290] * 4, *[2048] * 7]
    assert (len(found["as_it_is_firsts_ms"]), len(found["padded_firsts_ms"])) == (3, 3)


@pytest.mark.parametrize("n_tokens", [4096, 8192, 32_768])
def test_new_lengths_are_one_length_for_cudnn(benchmarks: Any, n_tokens: int) -> None:
    lengths = benchmarks.layer_pairs.lengths_below(n_tokens, 14)
    assert len(set(lengths)) == 14
    assert {-(-length // 1024) * 1024 for length in lengths} == {n_tokens}


def test_attention_from_two_parts_is_counted(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = benchmarks.layer_pairs.heads_of(PRESETS["llama-100m"], 30, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(attention, "why_not_merged", lambda *_: None)
    with benchmarks.synthetic.attention_kernels() as seen:
        attention.attend_parts([attention.Part(k, v)], q[:, :, 20:], None, torch.arange(20, 30)[None], 30)
    assert dict(seen) == {"merged": 1}


def test_the_old_ways_are_over_when_they_were_measured(benchmarks: Any, dummy: LLM) -> None:
    before = [prefill._propagated_only_pays, attention._PADDED_BELOW, key_products.has_float32_products]
    with benchmarks.old_ways.all_tokens_attend():
        assert not prefill._propagated_only_pays(dummy.model, 10**6, None)
    with benchmarks.old_ways.no_padding():
        heads = torch.zeros(1, 1, 5, 1)
        assert attention._padded(heads) is heads
    with benchmarks.old_ways.copied_keys():
        assert not scores.has_float32_products(torch.bfloat16, torch.device("cuda"))
    assert before == [prefill._propagated_only_pays, attention._PADDED_BELOW, key_products.has_float32_products]


@pytest.mark.parametrize("passage", [1, 64])
def test_tokens_by_chance_or_in_passages(benchmarks: Any, passage: int) -> None:
    indices = benchmarks.layer_pairs.some_of(10_000, passage, torch.device("cpu"))[0]
    assert 1900 < len(indices) < 2100
    assert indices[-1] == 9999
    assert (indices.diff() > 0).all()
    assert bool((indices.diff() == 1).float().mean() > 0.9) == (passage == 64)


def test_compiled_decoding_is_measured_in_three_ways(
    benchmarks: Any, archive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own, which this one hands its arguments and its environment."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def child(self: Any, argv: list[str], limit: float, settings: dict[str, str]) -> tuple[int, str]:
        started.append((argv, settings))
        return 0, 'a line\n{"case": "fastkv 64", "step_ms": 2.0}\n'

    monkeypatch.setattr(benchmarks.suite_steps.Suite, "child", child)
    steps = ["compiled", "compiled-apart", "compiled-tuned"]
    assert benchmarks.gpu_suite.main(["--out", str(tmp_path), *SUITE, str(archive_folder), "--steps", *steps]) == 0
    assert ["--apart" in argv for argv, _ in started] == [False, True, False]
    assert [sorted(settings) for _, settings in started] == [[], [], sorted(benchmarks.suite_steps.TUNED)]
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("*-gpu-suite.json"))
    assert [(each["step"], each["case"]) for each in saved["figures"][::2]] == [(step, "fastkv 64") for step in steps]
    assert {each["status"] for each in saved["figures"]} == {"done"}


def test_a_child_gets_the_environment_that_a_step_names(benchmarks: Any, tmp_path: Path) -> None:
    record = benchmarks.suite_record.Record(tmp_path, "run", {})
    suite = benchmarks.suite_steps.Suite(SimpleNamespace(), torch.device("cpu"), record, 0.0)
    argv = ["-c", "import os; print(os.environ.get('FASTKV_TRIED'), 'PATH' in os.environ)"]
    assert suite.child(argv, 30, {"FASTKV_TRIED": "yes"}) == (0, "yes True\n")
    assert suite.child(argv, 30) == (0, "None True\n")


def test_random_caches_are_as_long_as_a_prefill_leaves_them(benchmarks: Any, dummy: LLM) -> None:
    """Entries, positions and tokens to come: all but the values is what the engine itself would decode on."""
    for policy in (FullKV(), FastKV(), AdaKV(kv_len=40)):
        with benchmarks.synthetic.Sequences(dummy, policy, 400, 1, 3) as sequences:
            (cache,) = (each.cache for each in sequences._batch._at_work.values())
            real = dummy.prefill(list(range(3, 403)), policy, max_tokens=4).cache
            assert torch.equal(cache.lengths.sum(2), real.lengths.sum(2))  # AdaKV shares them out by the values
            assert torch.equal(cache.next_position, real.next_position)
            assert (cache.position, cache.room, cache.entries) == (real.position, real.room, real.entries)
            before = cache.lengths.clone()
            sequences.step()
            assert torch.equal(cache.lengths, before + 1)
            for part in cache.read(0):
                assert part.k[:, :, :-1].std() > 0.8
    out = dummy.generate(list(range(3, 403)), SamplingParams(max_tokens=2), FullKV())  # the engine is as it was
    assert out.metrics.kv_entries == out.metrics.kv_full_entries


# --- footprint ---


def test_footprint_prints_what_children_measure(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[dict[str, Any]] = []

    def child(case: dict[str, Any], exact: bool) -> dict[str, Any]:
        cases.append({**case, "exact": exact})
        sizes = dict.fromkeys(("cache", "buffers", "scratch", "estimate"), 3 * 2**20)
        return {"dtype": "float32", **sizes, "measured": 2 * 2**20}

    monkeypatch.setattr(benchmarks.footprint, "child", child)
    argv = ["--model", "a/model", "--model", "b", "--tokens", "8,16", "--policies", "full"]
    assert benchmarks.footprint.main(argv) == 0
    assert [(case["model"], case["tokens"], case["exact"]) for case in cases[:3]] == [
        ("a/model", 8, True),
        ("a/model", 8, False),
        ("a/model", 16, True),
    ]
    out = capsys.readouterr().out
    assert "| a/model | float32 | full | 8 | 3.0 | 3.0 | 3.0 | 3.0 | 2.0 | 1.50 | 2.0 |" in out
    assert "| b | float32 | 3.0 | 2.0 | 1.50 |" in out
    assert benchmarks.footprint.main(["--model", "a", "--policies", "none"]) == 2
    assert benchmarks.footprint.main([]) == 2


def test_footprint_measures_without_a_tokenizer(benchmarks: Any, archive_folder: Path, tmp_path: Path) -> None:
    bare = benchmarks.footprint.without_tokenizer(archive_folder, tmp_path)
    assert sorted(file.name for file in bare.iterdir()) == ["config.json", "model.safetensors"]


def test_lossless_is_compared_with_the_full_cache(
    benchmarks: Any, archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    argv = [
        "--model",
        str(archive_folder),
        "--device",
        "cpu",
        "--lengths",
        "200",
        "--prompts",
        "2",
        "--new-tokens",
        "6",
    ]
    assert benchmarks.lossless_speed.main([*argv, "--draft-tokens", "2", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]["200"]
    assert [row["identical"] for row in rows] == [True, True]
    assert all(row["new_tokens"] == 6 and 150 < row["tokens"] < 250 for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 200 | 2 of 2 | ")
    assert benchmarks.lossless_speed.main([*argv, "--prompts", "0"]) == 2


def test_steps_of_several_policies_are_measured_in_turn(
    benchmarks: Any, archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first policy is what the others are compared with; entries may be packed."""
    out = tmp_path / "out.json"
    few = ["--policy", "full", "--policy", "quest:read_len=48,min_tokens=8", "--policy", "full:kv_dtype=int8"]
    argv = ["--model", str(archive_folder), "--device", "cpu", "--context", "150", "--steps", "2", "--rounds", "2"]
    assert benchmarks.decode_steps.main([*argv, *few, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["policy"] for row in rows] == few[1::2]
    assert all(len(row["seconds"]) == 2 for row in rows)
    assert rows[2]["cache_bytes"] < rows[0]["cache_bytes"] <= rows[1]["cache_bytes"]
    assert "| 1.00 (1.00 to 1.00) |" in capsys.readouterr().out.splitlines()[-3]
    assert benchmarks.decode_steps.main([*argv, "--rounds", "0"]) == 2
    assert benchmarks.decode_steps.main([*argv, "--context", "9999999"]) == 2


def test_many_questions_are_measured_in_three_ways(
    benchmarks: Any, archive_folder: Path, dummy: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which give the same answers where everything is kept; the first round does not count."""
    ways = benchmarks.many_questions.ways(dummy, FullKV(), SamplingParams(max_tokens=3, ignore_eos=True))
    answers = [way(list(range(50)), [[5, 6], [9, 8, 7]]) for way in ways.values()]
    assert answers[0] == answers[1] == answers[2]
    small = ["--length", "60", "--questions", "2", "--question-tokens", "3", "--new-tokens", "2", "--rounds", "2"]
    argv = ["--model", str(archive_folder), "--device", "cpu", *small]
    assert benchmarks.many_questions.main([*argv, "--json", str(tmp_path / "out.json")]) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(ways) == list(result["seconds"])
    assert all(len(each) == 2 for each in result["seconds"].values())
    assert rows[0].endswith("| 1.0 |")
    told = benchmarks.many_questions.table({"a": [3.0, 1.0, 2.0], "b": [0.5, 0.25, 1.0]})
    assert told.splitlines()[2:] == ["| a | 2.00 (1.00 – 3.00) | 1.0 |", "| b | 0.50 (0.25 – 1.00) | 4.0 |"]
    for wrong, named in (
        (["--rounds", "0"], "--rounds: "),
        (["--policy", "x"], "--policy: "),
        (["--length", "9000"], "room"),
    ):
        assert benchmarks.many_questions.main([*argv, *wrong]) == 2
        assert named in capsys.readouterr().err
