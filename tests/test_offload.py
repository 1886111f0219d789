"""Prefill by host memory is the usual prefill, and holds on the device what it says, on a CPU that keeps both apart."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_host_blocks import LateLanes
from torch import Tensor
from two_devices import DEVICE, HOST, two_devices

from fastkv import LLM, FastKVError, Policy, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policies import FastKV, FullKV, SnapKV, StreamingLLM
from fastkv.cli import main
from fastkv.engine import footprint as footprint_module
from fastkv.engine.decode import decode_step
from fastkv.engine.footprint import Footprint, footprint
from fastkv.engine.offloading import plan as offload_plan
from fastkv.engine.offloading import streamed_attention
from fastkv.engine.offloading.plan import offloaded, planned_for_memory, why_not_offloaded
from fastkv.engine.offloading.run import OffloadedRun, kind_of
from fastkv.engine.plan import Offload, RequestPlan, plan_request, position_limit
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.request import check_request_fits
from fastkv.engine.workspace import Workspace
from fastkv.models.config import ModelConfig
from fastkv.models.granite import Multipliers
from fastkv.models.llama import Llama
from fastkv.models.presets import PRESETS
from fastkv.models.weights import meta_model, random_weights

CPU = torch.device("cpu")
STEPS = 4


def network(family: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    """Four layers of random weights, whose attention is sharper than they would have it."""
    settings = {"n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "context_length": 4096, **changes}
    model = random_weights(ModelConfig(f"{family}ForCausalLM", 60, 24, 40, **settings), dtype, CPU)
    for block in model.blocks:
        block.self_attn.qkv_proj.weight.data.mul_(1.5)
    return model


def ids_of(n_tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 60, (batch, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def plan_of(model: Llama, policy: Policy, n_tokens: int, chunk: int = 0, layers: int = 0) -> RequestPlan:
    """chunk: tokens on the device (0: all, the usual way). layers: by host memory (0: all of them)."""
    limit = position_limit(model.config, policy, n_tokens)
    plan = plan_request(model.config, policy, n_tokens, STEPS + 1, model.dtype, limit)
    offload = Offload(layers or len(plan.layers), chunk) if chunk else None
    return dataclasses.replace(plan, offload=offload)


def run(model: Llama, policy: Policy, ids: Tensor, chunk: int = 0, layers: int = 0) -> tuple[Prefill, list[Tensor]]:
    """The prefill, and the logits of some steps after it, greedy ones."""
    plan = plan_of(model, policy, ids.shape[1], chunk, layers)
    cache = plan.new_cache(ids.shape[0], CPU)
    found = prefill(model, ids, plan, cache, Workspace(), kind=kind_of(plan))
    logits = [found.logits.clone()]
    with torch.inference_mode():
        for _ in range(STEPS):
            logits.append(decode_step(model, cache, logits[-1].argmax(-1, keepdim=True))[:, -1].clone())
    return found, logits


def check_same(model: Llama, policy: Policy, ids: Tensor, chunk: int, layers: int = 0) -> None:
    expected, logits = run(model, policy, ids)
    found, others = run(model, policy, ids, chunk, layers)
    assert all(map(torch.equal, found.kept, expected.kept))
    assert all(map(torch.equal, found.tokens, expected.tokens))
    for one, other in zip(expected.cache.layers, found.cache.layers, strict=True):  # what a graph is captured for
        assert [one.span(0), one.count(0)] == [other.span(0), other.count(0)]
    for one, other in zip(logits, others, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
        assert torch.equal(one.argmax(-1), other.argmax(-1))
    for one, other in zip(expected.mass, found.mass, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(other.kept / other.total, one.kept / one.total, atol=1e-4, rtol=1e-4)


EACH: dict[str, Policy] = {
    "full": FullKV(),
    "fastkv": FastKV(min_tokens=8),
    "fastkv-paper": FastKV.paper(min_tokens=8),
    "snapkv": SnapKV(min_tokens=8, values=True),
    "streamingllm": StreamingLLM(min_tokens=8),
    "two reductions": FastKV(tsp_layer=(0, 2), tsp_rate=(0.5, 0.2), min_tokens=8),
    "all kept, few propagated": FastKV(kv_retention=1.0, min_tokens=8),
    "as many as hold the mass": FastKV(keep_mass=0.9, min_tokens=8),
}


# --- the same as the usual way ---


@pytest.mark.parametrize("policy", EACH.values(), ids=list(EACH))
@pytest.mark.parametrize(("n_tokens", "chunk"), [(230, 64), (37, 64), (200, 100)])
def test_it_is_the_usual_prefill(policy: Policy, n_tokens: int, chunk: int) -> None:
    """Chunks that divide the prompt and that do not, and a prompt that is shorter than one."""
    check_same(network(), policy, ids_of(n_tokens), chunk)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("name", ["fastkv", "full"])
def test_of_any_number_of_heads_and_several_prompts(heads: tuple[int, int], name: str) -> None:
    model = network(n_heads=heads[0], n_kv_heads=heads[1])
    check_same(model, EACH[name], ids_of(150, batch=2), 40)


FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_windows": (None, 30, None, 50)},
    "Qwen2": {"qkv_bias": True},
    "Qwen3": {},
    "Olmo2": {},
    "Granite": {"family_settings": Multipliers(12.0, 0.2, 0.22, 8.0)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family: str) -> None:
    """A sliding window hides some blocks whole, and parts of others."""
    model = network(family, **FAMILIES[family])
    check_same(model, FullKV(), ids_of(170), 40)
    if family != "Mistral":  # tokens are dropped within the window only
        check_same(model, FastKV(min_tokens=8), ids_of(170), 40)


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_after_the_offloaded_ones_run_the_usual_way(layers: int) -> None:
    policy = FastKV(tsp_layer=(0, 2), tsp_rate=(0.5, 0.2), min_tokens=8)
    check_same(network(), policy, ids_of(150), 40, layers)


def test_keys_under_a_mask_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_attention, "MASKED_KEYS", 16)
    monkeypatch.setattr(streamed_attention, "LOGITS", 500)
    check_same(network(), FastKV(min_tokens=8), ids_of(230), 64)


@pytest.mark.parametrize("has_sums", [True, False])
def test_a_kernel_that_tells_no_sums_is_done_without(monkeypatch: pytest.MonkeyPatch, has_sums: bool) -> None:
    """As of float32 on a GPU: by plain products, with few logits at a time."""
    seen: list[int] = []
    flash = streamed_attention.flash

    def watched(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(k.shape[2])
        return flash(rows, k, v)

    monkeypatch.setattr(streamed_attention, "flash", watched)
    monkeypatch.setattr(streamed_attention, "has_sums", lambda *_: has_sums)
    check_same(network(), FastKV(min_tokens=8), ids_of(150), 40)
    assert bool(seen) == has_sums


def test_blocks_may_come_as_late_as_they_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkv.engine.offloading.run.lanes_of", lambda device: LateLanes())
    for policy in (FullKV(), FastKV(min_tokens=8)):
        check_same(network(), policy, ids_of(230), 40)


def test_in_a_short_dtype_it_is_as_near_as_that_goes() -> None:
    model, ids = network(dtype=torch.bfloat16), ids_of(200)
    (expected, _), (found, _) = run(model, FullKV(), ids), run(model, FullKV(), ids, 64)
    torch.testing.assert_close(found.logits, expected.logits, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_entries_that_are_packed_a_chunk_at_a_time_are_the_same(kv_dtype: str) -> None:
    model, ids = network(), ids_of(200)
    found = []
    for offload in (None, Offload(4, 64)):
        plan = plan_request(model.config, FullKV(), 200, 1, torch.float32, 4096, kv_dtype=kv_dtype)
        plan = dataclasses.replace(plan, offload=offload)
        cache = plan.new_cache(1, CPU)
        prefill(model, ids, plan, cache, Workspace(), kind=kind_of(plan))
        found.append([part.k for layer in range(4) for part in cache.read(layer)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.1)  # a code apart, where sums are rounded otherwise


# --- host and device ---


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Footprints as of a GPU, whose host is another memory; what kernels hold inside is not seen."""
    with monkeypatch.context() as patched:
        patched.setattr(Footprint, "in_one_memory", lambda self: self)
        patched.setattr(footprint_module, "within_attention", lambda rows, mask, itemsize: 0)
        yield


def on_two_devices(
    monkeypatch: pytest.MonkeyPatch, model: Llama, policy: Policy, n_tokens: int, chunk: int, layers: int = 0
) -> tuple[Footprint, dict[str, int]]:
    """What is said to be held on each side, and what is."""
    plan, ids = plan_of(model, policy, n_tokens, chunk, layers), ids_of(n_tokens)
    model.reserve(4096)
    said = footprint(model, plan, plan.nbytes)
    with two_devices(monkeypatch, model, ids) as found:
        prefill(model, ids, plan, plan.new_cache(1, CPU), Workspace(), kind=kind_of(plan))
    return said, found.most


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("name", "layers"),
    [("full", 0), ("fastkv", 2), ("fastkv", 0), ("snapkv", 0), ("streamingllm", 0), ("two reductions", 1)],
)
def test_no_tensor_is_on_the_wrong_side_and_none_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, name: str, layers: int
) -> None:
    """Of propagated tokens the most is said: how many of a chunk stand under one mask depends on which they are."""
    said, most = on_two_devices(monkeypatch, network(n_heads=8), EACH[name], 600, 128, layers)
    high = 1.5 if isinstance(EACH[name], FastKV) else 1.2
    assert 0.95 * most[DEVICE] < said.total < high * most[DEVICE], (said, most)
    assert 0.9 * most[HOST] < said.on_host < 1.4 * most[HOST], (said, most)


def test_the_device_holds_of_a_longer_prompt_its_cache_and_lists_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is a chunk's. On the host a token has its hidden state, K, V, and the attention that it is paid."""
    model, policy = network(), SnapKV(min_tokens=8)
    (_, short), (_, long) = (on_two_devices(monkeypatch, model, policy, n, 128) for n in (512, 1024))
    cache = plan_of(model, policy, 1024).nbytes - plan_of(model, policy, 512).nbytes
    kept = 51  # tokens more of each layer
    positions = 512 * 8 + 4 * 2 * kept * 8
    brought = 2 * 2 * 16 * kept * 4  # of one layer, on its way to the cache
    assert long[DEVICE] - short[DEVICE] <= cache + positions + brought
    assert long[HOST] - short[HOST] > 512 * (24 + 2 * 2 * 16) * 4


def test_a_tensor_on_the_wrong_side_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OffloadedRun, "_positions_with", lambda self, layer, new: new.unsqueeze(1).expand(-1, 2, -1))
    with pytest.raises(AssertionError, match="of tensors on host and device"):
        on_two_devices(monkeypatch, network(), SnapKV(min_tokens=8), 200, 64)


# --- which prompts ---


def test_each_policy_says_for_itself_whether_it_scores_on_the_host() -> None:
    saying = {name for name, policy in POLICIES.items() if policy.scores_on_host}
    assert saying == {"full", "fastkv", "fastkv-paper", "snapkv", "streamingllm", "pyramidkv", "tova"}

    class Derived(SnapKV):
        pass

    assert not Derived.scores_on_host


@pytest.mark.parametrize("name", sorted(name for name, policy in POLICIES.items() if policy.scores_on_host))
def test_those_that_do_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, policy = network(), POLICIES[name]()
    assert why_not_offloaded(plan_of(model, policy, 300)) is None
    check_same(model, policy, ids_of(300), 100)


def test_what_it_does_not_go_with_is_told() -> None:
    model = network()

    def reason(policy: Policy, **changes: Any) -> str:
        return why_not_offloaded(dataclasses.replace(plan_of(model, policy, 300), **changes)) or ""

    assert "policy h2o, which looks at more of a layer" in reason(POLICIES["h2o"](min_tokens=8))  # type: ignore[call-arg]
    assert "heads keep different numbers" in reason(FastKV(keep_mass=0.9, keep_mass_by="head", min_tokens=8))
    assert "lookahead" in reason(FastKV(lookahead=4, min_tokens=8))
    assert "continues" in reason(FullKV(), past=(3, 3, 3, 3), start=3)
    assert "share_layers" in reason(FullKV(), shared=(0, 1, 1, 3))
    assert not reason(FastKV(keep_mass=0.9, min_tokens=8))


def test_few_layers_go_by_the_host_first_then_all() -> None:
    model = network()
    ways = offloaded(plan_of(model, FastKV(min_tokens=8), 300))
    assert [way.offload and way.offload.layers for way in ways] == [2, 4]
    assert [way.offload and way.offload.layers for way in offloaded(plan_of(model, FullKV(), 300))] == [4]


def test_the_first_way_that_fits_is_taken() -> None:
    model = network()
    plan, other = plan_of(model, FastKV(min_tokens=8), 300), plan_of(model, POLICIES["h2o"](min_tokens=8), 300)  # type: ignore[call-arg]

    def fits(*layers: int) -> Callable[[RequestPlan], None]:
        def check(way: RequestPlan) -> None:
            if (way.offload.layers if way.offload else 0) not in layers:
                raise FastKVError(f"no room for {way.offload}")

        return check

    assert planned_for_memory(plan, True, fits(0, 2, 4)) is plan
    for layers in (2, 4):
        taken = planned_for_memory(plan, True, fits(layers)).offload
        assert taken is not None
        assert (taken.layers, taken.chunk) == (layers, offload_plan.CHUNK)
    for allowed, given, layers, message in (
        (True, plan, (), r"no room for Offload\(layers=4, chunk=4096\)$"),
        (False, plan, (), "no room for None$"),
        (
            False,
            plan,
            (4,),
            r"no room for None, or take host memory, too: offload \(--offload of fastkv-run and fastkv-chat\)$",
        ),
        (True, other, (2,), "no room for None; offload does not go with policy h2o, which looks at"),
        (False, other, (2,), "no room for None$"),
    ):
        with pytest.raises(FastKVError, match=message):
            planned_for_memory(given, allowed, fits(*layers))


def test_too_little_host_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    plan = plan_of(model, FullKV(), 300, 64)
    needed = Footprint(0, 0, {}, 0, 0, {"host hidden": 2**20, "host keys and values": 2**20}, 2**19)
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: 2**20)
    with pytest.raises(FastKVError) as caught:
        check_request_fits(model, plan, needed)
    for words in ("needs 2.5 MiB", "2.0 MiB of hidden states, K and V of one layer on the host", "cpu has 1.0 MiB"):
        assert words in str(caught.value)
    check_request_fits(model, plan, needed, reusable_on_host=3 * 2**19)


# --- LLM ---


@pytest.fixture
def little(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """There is memory for 500 tokens by host memory, and not in the usual way; what ran is noted."""
    monkeypatch.setattr(offload_plan, "CHUNK", 128)
    tiny_llm.free_buffers()
    tiny_llm.offload = True
    request = tiny_llm._request([7] * 500, SamplingParams(max_tokens=4), FullKV())
    (way,) = offloaded(request.plan)
    needed = [footprint(tiny_llm.model, plan, tiny_llm._slot_bytes(request)).total for plan in (request.plan, way)]
    assert needed[1] < 0.9 * needed[0]
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: needed[1])
    yield tiny_llm
    tiny_llm.offload = False
    tiny_llm.free_buffers()


def test_a_prompt_that_fits_in_no_other_way_goes_by_host_memory(little: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    ids = torch.randint(3, 200, (500,), generator=torch.Generator().manual_seed(2)).tolist()
    out = little.generate(ids, params, FullKV())
    assert out.run.offloaded_layers == little.config.n_layers
    little.free_buffers()
    pair = little.generate([ids, ids], params, FullKV(), batch_size=1)
    little.free_buffers()
    pre = little.prefill(ids, FullKV(), max_tokens=4)
    assert little.generate(ids[:100], params, FullKV()).run.offloaded_layers == 0  # fits the usual way
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: None)
    usual = little.generate(ids, params, FullKV())
    assert (usual.token_ids, usual.run.offloaded_layers) == (out.token_ids, 0)
    assert [one.token_ids for one in pair] == [usual.token_ids] * 2
    assert {one.run.offloaded_layers for one in pair} == {little.config.n_layers}
    torch.testing.assert_close(pre.logits, little.prefill(ids, FullKV()).logits, atol=1e-4, rtol=1e-4)


def test_without_offload_the_refusal_names_it(little: LLM) -> None:
    little.offload = False
    with pytest.raises(FastKVError, match=r"the request needs .* or take host memory, too: offload \(--offload"):
        little.generate([7] * 500, SamplingParams(max_tokens=4), FullKV())


def test_the_command_takes_it_and_says_so(
    archive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where no request fits in the usual way. --json has it, too."""

    def check(model: Llama, plan: RequestPlan, *rest: Any) -> None:
        if plan.offload is None:
            raise FastKVError("no room; shorten the prompt")

    (tmp_path / "p.txt").write_text("The access code of the calm owl is 9264. " * 9)
    machine = ["--model", str(archive_folder), "--dtype", "float32", "--device", "cpu", "--max-tokens", "3"]
    command = [*machine, "--prompt", str(tmp_path / "p.txt"), "--policy", "full"]
    assert main(command) == 0
    usual = capfd.readouterr()
    monkeypatch.setattr("fastkv.engine.checked.check_request_fits", check)
    monkeypatch.setattr(offload_plan, "CHUNK", 64)
    assert main([*command, "--offload"]) == 0
    told = capfd.readouterr()
    assert told.out == usual.out
    assert re.search(r"prompt +\d+ tokens, 8 layers by host memory\n", told.err)
    assert main([*command, "--offload", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["offloaded_layers"] == 8
    assert main(command) == 2
    assert "shorten the prompt, or take host memory, too: offload (--offload of fastkv-run" in capfd.readouterr().err
    assert main([*command, "--offload", "--attention", "math"]) == 2
    assert "error: --offload: offload attends in a way of its own" in capfd.readouterr().err


def test_what_it_takes_is_told_of_a_model_that_is_not_there() -> None:
    """For plans: a model without weights, for a GPU."""
    config = PRESETS["llama-3.1-8b"]
    model = meta_model(config)
    model.computes_in(torch.bfloat16)
    plan = plan_request(config, FastKV(), 2**20, 256, torch.bfloat16, 2**21)
    usual, some, every = (footprint(model, way, plan.nbytes) for way in (plan, *offloaded(plan)))
    assert usual.on_host == 0
    assert some.on_host == every.on_host > 2**20 * (4096 + 2 * 1024) * 2
    assert every.total < some.total < 0.5 * usual.total
    assert every.total - every.cache - every.lists < 2**30


def test_speculation_does_not_go_with_it(little: LLM) -> None:
    with pytest.raises(FastKVError, match="fits by offload only, which speculation does not go with"):
        little.generate([7] * 500, SamplingParams(max_tokens=4), FullKV(), speculation="ngram")


def test_another_kernel_does_not_go_with_it(tiny_folder: Any) -> None:
    with pytest.raises(FastKVError, match="offload attends in a way of its own"):
        LLM(tiny_folder, device="cpu", offload=True, attention="math")
    with pytest.raises(FastKVError, match="offload must be True or False, not 'auto'"):
        LLM(tiny_folder, device="cpu", offload="auto")  # type: ignore[arg-type]
