"""Prefill by host memory on a GPU: the usual prefill, in memory that the usual one does not fit into.

    pytest tests/gpu

Skipped where torch sees no CUDA device; continuous integration has none. Written without one: never run so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from places import ROOT
from torch import Tensor

from fastkv import LLM, FastKV, FullKV, Policy, SamplingParams, SnapKV
from fastkv.engine.decode import decode_step
from fastkv.engine.footprint import footprint
from fastkv.engine.offloading.plan import offloaded
from fastkv.engine.offloading.run import kind_of
from fastkv.engine.plan import Offload, RequestPlan, plan_request
from fastkv.engine.prefill import Prefill, prefill
from fastkv.engine.workspace import Workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

ARCHIVE = ROOT / "examples" / "archive" / "model"
POLICIES: list[Policy] = [FullKV(), FastKV(), FastKV.paper(), SnapKV()]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(ARCHIVE, dtype=request.param, device="cuda")


def plan_of(llm: LLM, policy: Policy, n_tokens: int, chunk: int) -> RequestPlan:
    """chunk: 0 is the usual way."""
    plan = plan_request(llm.config, policy, n_tokens, 20, llm.dtype, max(n_tokens + 20, llm.config.context_length))
    return dataclasses.replace(plan, offload=Offload(len(plan.layers), chunk) if chunk else None)


def run(llm: LLM, plan: RequestPlan, ids: Tensor, workspace: Workspace) -> Prefill:
    cache = plan.new_cache(1, llm.device)
    return prefill(llm.model, ids.to(llm.device), plan, cache, workspace, kind=kind_of(plan))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("chunk", [300, 1000, 8192])
def test_it_is_the_usual_prefill(llm: LLM, policy: Policy, chunk: int) -> None:
    """Scores are summed on the host, and round otherwise: near ties of a few entries may fall to others."""
    ids = torch.randint(10, 1000, (1, 5000), generator=torch.Generator().manual_seed(5))
    usual = run(llm, plan_of(llm, policy, 5000, 0), ids, Workspace())
    workspace = Workspace()
    found = run(llm, plan_of(llm, policy, 5000, chunk), ids, workspace)
    exact = llm.dtype == torch.float32
    torch.testing.assert_close(found.logits, usual.logits, atol=0.01 if exact else 0.5, rtol=0.01 if exact else 0.1)
    for one, other in zip(usual.kept, found.kept, strict=True):
        assert one.device == other.device
        same = sum(
            len(set(a) & set(b)) for a, b in zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
        )
        assert same >= (0.99 if exact else 0.9) * one.numel()
    if exact:
        tokens = usual.logits.argmax(-1, keepdim=True)
        with torch.inference_mode():
            pair = [decode_step(llm.model, each.cache, tokens) for each in (usual, found)]
        torch.testing.assert_close(pair[1], pair[0], atol=0.01, rtol=0.01)
    hidden = workspace.host.take("host hidden", (1,), llm.model)
    assert hidden.device.type == "cpu"
    assert hidden.is_pinned()


@pytest.fixture
def wide() -> Iterator[LLM]:
    """Random weights: enough layers and values for memory to be more than noise."""
    yield LLM("llama-3.2-1b", dtype="bfloat16", device="cuda", load_format="dummy")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_it_runs_where_the_usual_way_does_not_fit(wide: LLM) -> None:
    """Under a limit half way between what the two are said to take; and it takes what is said."""
    n_tokens, policy = 100_000, FastKV()
    ids = torch.randint(10, 1000, (1, n_tokens), generator=torch.Generator().manual_seed(5))
    usual, way = (plan_of(wide, policy, n_tokens, chunk) for chunk in (0, 2048))
    wide.model.reserve(n_tokens + 20)
    said = [footprint(wide.model, plan, plan.nbytes).total for plan in (usual, way)]
    assert said[1] < 0.7 * said[0]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    limit = before + sum(said) // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(wide, usual, ids, Workspace())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = run(wide, way, ids, Workspace())
    assert found.logits.isfinite().all()
    assert torch.cuda.max_memory_allocated() - before < 1.15 * said[1]


def test_llm_takes_it_when_the_device_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `available_bytes` says so; the answer is the usual one."""
    llm = LLM(ARCHIVE, dtype="float32", device="cuda", offload=True)
    ids = torch.randint(10, 1000, (6000,), generator=torch.Generator().manual_seed(5)).tolist()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    usual = llm.generate(ids, params, SnapKV())
    llm.free_buffers()
    monkeypatch.setattr("fastkv.engine.offloading.plan.CHUNK", 512)
    request = llm._request(ids, params, SnapKV())
    plans = (request.plan, *offloaded(request.plan))
    said = [footprint(llm.model, plan, llm._slot_bytes(request)).total for plan in plans]
    assert said[1] < 0.9 * said[0]
    room = sum(said) // 2
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: room if device.type == "cuda" else None)
    found = llm.generate(ids, params, SnapKV())
    assert (usual.run.offloaded_layers, found.run.offloaded_layers) == (0, 8)
    assert found.token_ids == usual.token_ids
