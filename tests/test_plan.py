"""What a plan says is what a run takes: its memory by what is alive, its times by measured runs, its ranks by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import Shared
from test_footprint import CPU, model_of
from test_peak_memory import Alive
from torch import Tensor

from fastkv import LLM, FastKVError, FullKV, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.decode_budget import DecodeBudget
from fastkv.console.plan.command import main as plan_command
from fastkv.engine import footprint as footprint_module
from fastkv.engine.planning import layer_time
from fastkv.engine.planning.expected import decode_step, expected, first_token
from fastkv.engine.planning.machine import MACHINES, ON_CPU, Link, Machine, Reached
from fastkv.engine.planning.planned import Planned, Wanted, offloaded, planned
from fastkv.engine.planning.rank_sizes import rank_config, stored_config
from fastkv.models.presets import PRESETS
from fastkv.models.split import possible_counts

CUDA = torch.device("cuda")
# Whatever reaches its ceilings: 1 FLOP/s, 1 byte/s.
UNIT = Machine("unit", "cuda", None, 1.0, 1.0, Reached(1, 1, 1, 0, ""), "", link=Link(1.0, 0.0))


def wanted(llm: LLM, policy: str, n_tokens: int, **given: Any) -> Wanted:
    return Wanted(llm.config, POLICIES[policy](), n_tokens, llm.dtype, CPU, max_tokens=20, **given)


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    """Shapes whose largest step is the scores, or the MLP; one of int8 weights."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "narrow": model_of(folder / "narrow", 16, 8, 2),
        "wide": model_of(folder / "wide", 256, 4, 2),
        "short dtype": model_of(folder / "short", 16, 4, 4, dtype="bfloat16"),
        "int8": model_of(folder / "int8", 256, 4, 2, weights="int8"),
    }


# --- memory ---


def parameters(llm: LLM) -> int:
    """Bytes of the parameters and of their scales."""
    tensors: list[Tensor] = list(llm.model.parameters())
    scales = (getattr(each, "scale", None) for each in llm.model.modules())
    tensors += [scale for scale in scales if isinstance(scale, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


SIZES = [("narrow", 900), ("short dtype", 900), ("int8", 900), ("int8", 30)]  # of 30 the floats of some rows are most


@pytest.mark.parametrize(("shape", "n_tokens"), SIZES)
@pytest.mark.parametrize(
    ("policy", "given"),
    [
        ("full", {}),
        ("fastkv", {}),
        ("adakv", {}),
        ("gemfilter", {}),
        ("quest", {"batch": 3}),
        ("full", {"kv_dtype": "int8"}),
        ("snapkv", {"decode_budget": DecodeBudget(64), "batch": 3, "max_tokens": 700}),
        ("fastkv", {"batch": 3}),
    ],
)
def test_a_plan_without_a_model_is_the_one_that_a_request_is_checked_by(
    llms: dict[str, LLM], shape: str, n_tokens: int, policy: str, given: dict[str, Any]
) -> None:
    llm = llms[shape]
    asked = replace(wanted(llm, policy, n_tokens, weights="int8" if shape == "int8" else None), **given)
    plan = planned(asked)
    assert plan.weights == parameters(llm)
    llm.model.rotary = replaced_tables(llm)
    llm.kv_dtype = asked.kv_dtype
    try:
        params = SamplingParams(max_tokens=asked.max_tokens)
        request = llm._request([7] * n_tokens, params, asked.policy, decode_budget=asked.decode_budget)
    finally:
        llm.kv_dtype = None
    assert plan.request == request.plan
    cache = asked.batch * llm._slot_bytes(request)
    assert plan.needs == footprint_module.footprint(llm.model, request.plan, cache, slots=asked.batch)


def replaced_tables(llm: LLM) -> Any:
    """Rotary tables that cover no position yet, as those of a model that has just been loaded."""
    return type(llm.model)(llm.config).rotary


@pytest.mark.parametrize(("shape", "policy", "kv_dtype"), [
    ("narrow", "full", None),
    ("narrow", "fastkv", None),
    ("narrow", "h2o", None),
    ("short dtype", "full", None),
    ("wide", "adakv", None),
    ("wide", "gemfilter", None),
    ("narrow", "full", "int8"),
])  # fmt: skip
def test_memory_is_what_is_alive_in_a_run(
    llms: dict[str, LLM], shape: str, policy: str, kv_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and all that a prompt of 1,100 tokens and its answer make, within a tenth; not what torch hides."""
    monkeypatch.setattr(footprint_module, "within_attention", lambda rows, mask, itemsize: 0)
    llm = llms[shape]
    plan = planned(wanted(llm, policy, 1100, kv_dtype=kv_dtype))
    llm.free_buffers()
    llm.model.rotary = replaced_tables(llm)
    ids = torch.randint(3, 64, (1100,), generator=torch.Generator().manual_seed(0)).tolist()
    llm.kv_dtype = kv_dtype
    try:
        with Alive(llm.model) as alive:
            llm.generate(ids, SamplingParams(max_tokens=20, ignore_eos=True), POLICIES[policy]())
    finally:
        llm.kv_dtype = None
    said = plan.total - plan.products
    assert 0.9 * (alive.peak + parameters(llm)) < said < 1.1 * (alive.peak + parameters(llm))


def test_peaks_of_a_gpu_are_those_that_were_measured(benchmarks: Any) -> None:
    """llama-3.1-8b on an H200, prompts of 8K to a million tokens, full and FastKV: within 3 %."""
    peaks = [(run.plan.total, run.peak) for run in benchmarks.plan_times.runs() if run.peak is not None]
    assert len(peaks) == 9
    assert all(0.97 * peak < told < 1.03 * peak for told, peak in peaks)


def test_what_fastkv_run_refuses_is_refused(llms: dict[str, LLM]) -> None:
    llm = llms["narrow"]
    for given, message in (
        ({"n_tokens": 5000}, "the prompt has 5000 tokens, but the model's context"),
        ({"n_tokens": 4090, "max_tokens": 20}, "max_tokens must be at most 6, not 20"),
        ({"kv_dtype": "int8", "policy": POLICIES["quest"]()}, "kv_dtype does not go with policy quest"),
        ({"policy": POLICIES["fastkv"](tsp_layer=9)}, "tsp_layer"),  # type: ignore[call-arg]
        ({"ranks": 3}, "3 ranks cannot share 2 KV heads .* equally; take 2"),
    ):
        with pytest.raises(FastKVError, match=message):
            planned(replace(wanted(llm, "full", 900), **given))


# --- ranks ---


def test_a_rank_of_two_by_hand() -> None:
    """61 rows of the vocabulary are 31 for the larger part; norms are whole, and so are logits and hidden states."""
    config = replace(PRESETS["llama-100m"], vocab_size=61, hidden_size=8, intermediate_size=12, n_layers=1, n_heads=4)
    config = replace(config, n_kv_heads=2, head_dim=4)
    half = rank_config(config, 2)
    assert (half.n_heads, half.n_kv_heads, half.intermediate_size, half.vocab_size) == (2, 1, 6, 61)
    assert stored_config(config, 2).vocab_size == 31
    plans = [planned(Wanted(config, FullKV(), 100, torch.float32, CPU, 28, ranks=n)) for n in (1, 2)]
    matrices = [2 * 8 * 8 // n + 2 * 8 * 16 // n + 3 * 8 * 12 // n for n in (1, 2)]  # k and v; q and o; MLP
    assert plans[0].weights == 4 * (matrices[0] + 2 * 61 * 8 + 3 * 8)
    assert plans[1].weights == 4 * (matrices[1] + 2 * 31 * 8 + 3 * 8)
    assert plans[1].needs.cache * 2 == plans[0].needs.cache == 2 * 128 * 2 * 4 * 4
    assert plans[1].needs.workspace["hidden"] == plans[0].needs.workspace["hidden"]
    assert plans[1].needs.workspace["heads"] * 2 == plans[0].needs.workspace["heads"]


def test_how_many_ranks_a_model_takes() -> None:
    assert possible_counts(PRESETS["llama-3.1-70b"]) == [1, 2, 4, 8]
    assert possible_counts(PRESETS["qwen2.5-7b"]) == [1, 2, 4]
    odd = replace(PRESETS["llama-3.1-70b"], intermediate_size=28_674)
    assert possible_counts(odd) == [1, 2]
    with pytest.raises(FastKVError, match=r"4 ranks cannot share 28674 MLP columns"):
        rank_config(odd, 4)


def test_offload_leaves_a_chunk_on_the_device() -> None:
    """Hidden states, K and V of all tokens lie on the host; under full none of them is on the device."""
    plans = [planned(plan_on(2**18, policy)) for policy in ("full", "fastkv")]
    for plan in plans:
        found = offloaded(plan)[0]
        assert found.host >= 2**18 * (8192 + 2 * 128) * 2
        assert found.device < plan.total
    full = offloaded(plans[0])[0]
    assert full.host == pytest.approx(2**18 * (8192 + 2 * 128) * 2, rel=0.01)
    left = full.device - plans[0].weights - plans[0].needs.cache - plans[0].needs.lists
    assert left < 2**30 < plans[0].working - plans[0].needs.lists


def plan_on(n_tokens: int, policy: str = "fastkv", ranks: int = 8, **given: Any) -> Wanted:
    """Of the 70B shape on GPUs."""
    config = PRESETS["llama-3.1-70b"]
    return Wanted(config, POLICIES[policy](), n_tokens, torch.bfloat16, CUDA, max_tokens=32, ranks=ranks, **given)


# --- times ---


def test_what_a_layer_costs_is_measured_by_two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < layer_time.measure_layer(CPU, torch.float32) < 1
    steps = {2: 0.3, 10: 1.1}
    monkeypatch.setattr(layer_time, "_step_of", lambda n_layers, device, dtype: steps[n_layers])
    assert layer_time.measure_layer(CPU, torch.float32) == pytest.approx(0.1)


def test_the_shares_reached_are_the_fit_to_the_measured_runs(benchmarks: Any) -> None:
    module, machine = benchmarks.plan_times, MACHINES["h200"]
    found, reached = module.runs(), machine.reached
    fit = module.fitted(found, machine)
    assert (reached.products, reached.attention, reached.reading) == tuple(
        round(each, 2) for each in (fit.products, fit.attention, fit.reading)
    )
    assert reached.layer_s == round(fit.layer_s, 6)
    for run in found:
        for told, seconds in ((first_token, run.first), (decode_step, run.step)):
            if seconds is not None:
                assert sum(told(run.plan, machine).values()) == pytest.approx(seconds, rel=0.08)


def test_the_figures_of_machines_are_those_of_their_files(benchmarks: Any) -> None:
    machine, folder = MACHINES["h200"], benchmarks.plan_times.RESULTS
    record = json.loads((folder / str(machine.source)).read_text())
    found = {each["case"]: each for each in record["figures"] if each["step"] == "ceilings"}
    assert machine.flops == pytest.approx(found["product"]["flops_per_s"], rel=1e-3)
    assert machine.bandwidth == pytest.approx(found["copy"]["bytes_per_s"], rel=1e-3)
    assert machine.memory == 2**20 * int(re.findall("([0-9]+) MiB", record["nvidia_smi"])[0])
    record = json.loads((folder / ON_CPU.source.partition(",")[0]).read_text())
    rows = [row for row in record["rows"] if row["name"] != "transformers"]
    for share, key in ((ON_CPU.products, "prefill_of_ceiling"), (ON_CPU.reading, "decode_of_ceiling")):
        assert share == pytest.approx(sum(row[key] for row in rows) / len(rows), abs=0.005)


def work_of(plan: Planned, machine: Machine = UNIT) -> dict[str, float]:
    return first_token(plan, machine)


def test_ranks_share_the_work_and_send_hidden_states() -> None:
    """Half of products and attention each; of the all-reduces every rank of two sends as much as is added up."""
    one, two = (planned(plan_on(4096, "full", ranks)) for ranks in (1, 2))
    whole, half = work_of(one), work_of(two)
    assert half["products"] * 2 == pytest.approx(whole["products"], rel=1e-6)
    assert half["attention"] * 2 == whole["attention"]
    assert "all-reduces" not in whole
    tokens = 4096 + 2 * (79 * 4096 + 1)  # the embedding, and two of each layer, the last of which one token leaves
    assert half["all-reduces"] == 2 * (tokens * 8192 + 128_256)
    later = work_of(two, replace(UNIT, link=Link(1e30, 1.0)))
    assert later["all-reduces"] == pytest.approx(1 + 2 * 80 + 1)


def test_a_step_reads_weights_and_what_is_kept() -> None:
    """All but the embedding; of the entries a rank's own, amid the answer; twice an all-reduce in a layer."""
    plan = planned(plan_on(4096, "full", 8, batch=3))
    parts = decode_step(plan, replace(UNIT, flops=1e30, reached=Reached(1, 1, 1, 0.5, "")))
    assert parts["weights"] == plan.weights - 2 * 8192 * 128_256 / 8
    assert parts["entries"] == 3 * 80 * (4096 + 16) * 2 * 128 * 2
    assert parts["small kernels"] == 40
    assert parts["all-reduces"] == pytest.approx(2 * 7 / 8 * 3 * 2 * (161 * 8192 + 128_256))
    bound = decode_step(plan, replace(UNIT, bandwidth=1e30))
    assert bound["weights"] == 3 * parts["weights"]  # two operations a value of two bytes, for each sequence


def test_a_first_token_waits_for_weights_and_layers() -> None:
    """Of a short prompt, whose products are few: no sooner than a step is. A probe and a first pass are read too."""
    machine = replace(UNIT, flops=1e30, reached=Reached(1, 1, 1, 0.5, ""))
    parts, step = (told(planned(plan_on(128, "full", 1)), machine) for told in (first_token, decode_step))
    assert parts["products"] == step["weights"]
    assert parts["small kernels"] == step["small kernels"] == 40
    twice = first_token(planned(plan_on(2**14, "kvzip", 1)), machine)
    assert (twice["products"], twice["small kernels"]) == (2 * parts["products"], 80)
    filtered = planned(plan_on(2**14, "gemfilter", 1))
    assert filtered.request.first_pass is not None
    assert first_token(filtered, machine)["small kernels"] == 40 + filtered.request.first_pass.layer / 2
    for name in ("llama-3.2-1b", "llama-100m"):
        plan = planned(replace(plan_on(128, "full", 1), config=PRESETS[name]))
        first, step = (sum(told(plan, MACHINES["h200"]).values()) for told in (first_token, decode_step))
        assert 0.9 * step < first


def test_steps_that_read_few_entries() -> None:
    whole, few = (decode_step(planned(plan_on(2**17, name, 1)), UNIT)["entries"] for name in ("full", "quest"))
    assert 0.05 * whole < few < 0.5 * whole


def test_what_is_not_known_is_said_and_not_guessed() -> None:
    machine = MACHINES["h200"]

    def why(machine: Machine, policy: str = "full", **given: Any) -> tuple[bool, bool, str]:
        found = expected(planned(replace(plan_on(4096, policy, 2), **given)), machine)
        return found.first is not None, found.step is not None, "; ".join((*found.unknown, *found.notes))

    assert why(machine) == (True, True, "")
    assert why(replace(machine, flops=None))[:2] == (False, False)
    assert why(replace(machine, link=None)) == (False, False, "how fast ranks send is not known: give --link")
    assert why(machine, dtype=torch.float32) == (False, False, "h200 was not measured in float32: give its --flops")
    assert why(machine, weights="int8")[:2] == (False, False)
    assert why(machine, kv_dtype="int8")[:2] == (True, False)
    assert why(machine, "quest")[:2] == (True, False)
    assert "is not counted" in why(machine, "h2o")[2]
    assert "compete for entries" in why(machine, "adakv")[2]
    assert "1.3 times" in why(machine, "adakv")[2]


def test_a_probe_and_a_first_pass_are_work() -> None:
    """KVzip reads the prompt again, each part of which attends to all of it; GemFilter reads it up to its layer."""
    full, twice, filtered = (work_of(planned(plan_on(2**14, name, 1))) for name in ("full", "kvzip", "gemfilter"))
    assert twice == {"products": 2 * full["products"], "attention": 3 * full["attention"], "small kernels": 0}
    layer = POLICIES["gemfilter"]().first_pass(80, 2**14).layer  # type: ignore[union-attr]
    assert filtered["attention"] > full["attention"] * layer / 80


def test_a_line_of_the_table_is_a_plan_beside_two_processes(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, mib = benchmarks.plan_memory, 2**20

    def run_json(command: list[str], environment: dict[str, str]) -> Any:
        if "--json" in command:
            assert plan_command(command[3:]) == 0  # after python -c PROGRAM
            found = json.loads(capsys.readouterr().out)
            assert found["kv_dtype"] == "int8"
            return found | {"memory_bytes": dict.fromkeys("abc", mib), "needed_bytes": 3 * mib}
        return (2 if "MALLOC_MMAP_THRESHOLD_" in environment else 4) * mib

    monkeypatch.setattr(module, "run_json", run_json)
    folder = module.config_folder("tiny", tmp_path)
    case = dict(zip(module.KEYS, (folder, "float32", "full", "int8", 600), strict=True)) | {"tiny": folder}
    figures = "1.0 | 1.0 | 1.0 | 3.0 | 2.0 | 1.50 | 4.0 | 0.75"
    assert module.row(case, 1) == f"| tiny | float32, int8 entries | full | 600 | {figures} |"
    assert module.measured({**case, "threads": 1}) > 0
    assert {case[0] for case in module.CASES} - set(PRESETS) <= set(module.SHAPES)


@pytest.mark.parametrize("policy", ["full", "fastkv", "snapkv", "h2o"])
def test_a_plan_of_two_ranks_is_what_a_rank_is_checked_by(llms: dict[str, LLM], policy: str) -> None:
    llm = llms["wide"]
    plan = planned(wanted(llm, policy, 900, ranks=2))

    def of_rank(own: LLM) -> tuple[int, Any]:
        request = own._request([7] * 900, SamplingParams(max_tokens=20), POLICIES[policy]())
        return parameters(own), footprint_module.footprint(own.model, request.plan, own._slot_bytes(request))

    shared = Shared(llm._folder, load_format="dummy")
    assert shared.run(of_rank)[0] == (plan.weights, plan.needs)
