"""Layers that read an earlier one's entries: the engine does what plain pieces do, and stores one K and V for both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sharing import entries_and_hidden
from test_footprint import model_of
from test_peak_memory import Alive

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policies import AdaKV, SnapKV
from fastkv.cache.policy import LayerPlan, Policy
from fastkv.engine import footprint as footprint_module
from fastkv.engine.footprint import footprint
from fastkv.engine.plan import plan_request, position_limit
from fastkv.engine.shared_layers import held_at_most
from fastkv.models.files import fingerprint

PAIRS = {3: 1, 4: 0, 5: 1}  # reader: source, of six layers
SOURCES = (0, 1, 2, 1, 0, 1)
IDS = torch.randperm(200, generator=torch.Generator().manual_seed(4))[:120] + 20
NEXT = [7, 191, 33, 64]
NO_TSP = FastKV(tsp_rate=1, kv_len=24)


@pytest.fixture
def llm(tiny_llm: LLM) -> Iterator[LLM]:
    """The tiny model with shared layers, and without them again."""
    tiny_llm.share_layers = PAIRS
    yield tiny_llm
    tiny_llm.share_layers = None


@pytest.mark.parametrize(
    "policy",
    [
        FullKV(),
        NO_TSP,
        FastKV(tsp_layer=2, tsp_len=40, kv_len=24),  # two pairs on either side of it
        FastKV(tsp_layer=3, tsp_len=40, kv_len=24),  # a layer that reads another decides which tokens are propagated
        FastKV(tsp_layer=(0, 4), tsp_len=(70, 40), kv_retention=1),  # the first of the two is a source
        SnapKV(kv_len=24),
        AdaKV(kv_len=24),
    ],
    ids=lambda policy: policy.name,
)
def test_a_reader_reads_what_its_source_holds(llm: LLM, policy: Policy) -> None:
    """Logits of the prompt and of four steps are those of attention matrices over the source's K and V."""
    pre = llm.prefill(IDS, policy, max_tokens=8)
    hidden = entries_and_hidden(llm, [*IDS.tolist(), *NEXT], SOURCES, pre)[1]
    expected = llm.model.lm_head(hidden[:, len(IDS) - 1 :])
    torch.testing.assert_close(pre.logits, expected[:, 0], rtol=1e-4, atol=1e-4)
    for step, token in enumerate(NEXT):
        logits = llm.decode(pre.cache, torch.tensor([token]))
        torch.testing.assert_close(logits, expected[:, step + 1], rtol=1e-4, atol=1e-4)
    for reader, source in PAIRS.items():
        assert torch.equal(pre.kept[reader], pre.kept[source])
        assert torch.equal(pre.cache.positions(reader), pre.cache.positions(source))


def test_it_is_the_sources_entries_that_count(llm: LLM) -> None:
    """Else the test above could pass for a model whose layers hardly differ."""
    shared, own = llm.prefill(IDS, FullKV()).logits, None
    llm.share_layers = None
    own = llm.prefill(IDS, FullKV()).logits
    assert (shared - own).abs().max() > 0.05


@pytest.mark.parametrize("policy", [FullKV(), FastKV(tsp_layer=2, tsp_len=40, kv_len=24)], ids=["full", "fastkv"])
def test_a_reader_computes_queries_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    for reader in PAIRS:
        for name in ("project", "project_kv"):
            monkeypatch.setattr(llm.model.blocks[reader], name, lambda *args, **settings: pytest.fail("k and v"))
    llm.generate([IDS.tolist(), IDS[:90].tolist()], SamplingParams(max_tokens=3, ignore_eos=True), policy)


def test_several_tokens_and_sequences_at_once(llm: LLM) -> None:
    """A batch of prompts, and a step of several tokens: rows and steps as each alone."""
    both = torch.stack((IDS, IDS.flip(0)))
    for policy in (FullKV(), FastKV(tsp_layer=2, tsp_len=40, kv_len=24)):
        pre = llm.prefill(both, policy, max_tokens=8)
        steps = llm.decode(pre.cache, torch.tensor([NEXT, NEXT]))
        for row, ids in enumerate(both):
            alone = llm.prefill(ids, policy, max_tokens=8)
            torch.testing.assert_close(pre.logits[row : row + 1], alone.logits, rtol=1e-4, atol=1e-4)
            for step, token in enumerate(NEXT):
                logits = llm.decode(alone.cache, torch.tensor([token]))
                torch.testing.assert_close(steps[row : row + 1, step], logits, rtol=1e-4, atol=1e-4)
        before = pre.cache.entries
        pre.cache.truncate(2)
        assert before - pre.cache.entries == 3 * 2 * 2  # of the three layers that hold any
        again = llm.decode(pre.cache, torch.tensor([NEXT[2:], NEXT[2:]]))
        torch.testing.assert_close(again, steps[:, 2:], rtol=1e-4, atol=1e-4)


def test_the_source_chooses_as_it_does_alone(llm: LLM) -> None:
    """Layers before the first reader do not notice."""
    shared = llm.prefill(IDS, NO_TSP).kept
    llm.share_layers = None
    own = llm.prefill(IDS, NO_TSP).kept
    assert all(torch.equal(shared[layer], own[layer]) for layer in (0, 1, 2))


def test_an_empty_map_changes_nothing(tiny_llm: LLM, llm: LLM) -> None:
    for policy in (FullKV(), FastKV(min_tokens=8)):
        found = []
        for given in (None, {}):
            llm.share_layers = given
            assert llm.share_layers == {}
            pre = llm.prefill(IDS, policy, max_tokens=2)
            found.append((pre.logits, llm.decode(pre.cache, torch.tensor([9])), pre.cache.nbytes))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][2] == found[1][2]


@pytest.mark.parametrize(
    "policy", [FullKV(), FastKV(tsp_layer=2, min_tokens=8), AdaKV(kv_len=24)], ids=lambda policy: policy.name
)
def test_one_k_and_v_for_both(llm: LLM, policy: Policy) -> None:
    """Half of the layers have entries: half of the bytes, of what the request is said to keep, and in the pool."""
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    llm.free_buffers()
    shared = llm.generate(IDS.tolist(), params, policy)
    state = llm._runtime.buffers.lease().state
    assert state is not None
    allocated = sum(layer.k.nbytes + layer.v.nbytes for layer in state.pool.layers if hasattr(layer, "k"))
    assert allocated == state.pool.nbytes
    llm.share_layers = None
    llm.free_buffers()
    own = llm.generate(IDS.tolist(), params, policy)
    state = llm._runtime.buffers.lease().state
    assert state is not None
    assert allocated * 2 == state.pool.nbytes
    metrics = shared.metrics
    assert metrics.kv_full_bytes == own.metrics.kv_full_bytes
    assert metrics.layer_entries[3:] == (0, 0, 0)
    assert metrics.layer_entries[:3] == own.metrics.layer_entries[:3]
    assert metrics.kv_entries == sum(own.metrics.layer_entries[:3])
    if policy == FullKV():
        assert metrics.kv_bytes * 2 == own.metrics.kv_bytes
        assert metrics.kv_entries * 2 == own.metrics.kv_entries
        assert metrics.read_bytes == own.metrics.read_bytes  # a step reads the source's twice
        assert metrics.attention_kept == 1
    else:
        assert metrics.attention_kept is None  # what readers attend to was not measured
    assert shared.run.shared_layers == tuple(PAIRS.items())
    assert own.run.shared_layers == ()


def test_a_list_gives_what_each_prompt_gives(llm: LLM) -> None:
    """Slots come and go; short prompts drop nothing, and lie in the layout of the others."""
    prompts = [IDS.tolist(), IDS[:30].tolist(), IDS[40:].tolist(), IDS[:90].tolist(), IDS[20:50].tolist()]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for policy in (FullKV(), FastKV(tsp_layer=2, min_tokens=32), AdaKV(min_tokens=60)):
        together = llm.generate(prompts, params, policy, batch_size=3)
        alone = [llm.generate(prompt, params, policy) for prompt in prompts]
        assert [output.token_ids for output in together] == [output.token_ids for output in alone]
        assert [output.metrics.kv_bytes for output in together] == [output.metrics.kv_bytes for output in alone]
        streamed = [piece.token_id for piece in llm.stream(prompts[0], params, policy)]
        assert streamed == alone[0].token_ids


def test_prompts_that_begin_alike_are_read_whole(llm: LLM) -> None:
    """What would be copied of their beginning has no entries of readers."""
    prompts = [[*IDS.tolist(), token] for token in NEXT[:2]]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), FullKV())
    assert [output.metrics.reused_tokens for output in outputs] == [0, 0]


def test_slots_of_one_map_are_not_used_for_another(llm: LLM) -> None:
    """The memory of the last request stays; it must not be read by layers that no longer share."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    answers = {}
    for pairs in ({}, PAIRS, {5: 4}):
        llm.free_buffers()
        llm.share_layers = pairs
        answers[str(pairs)] = llm.generate(IDS.tolist(), params, FullKV()).token_ids
    for pairs in (PAIRS, {}, {5: 4}, PAIRS):
        llm.share_layers = pairs
        assert llm.generate(IDS.tolist(), params, FullKV()).token_ids == answers[str(pairs)]
        idle = llm._runtime.buffers.lease()
        llm._runtime.buffers.give_back(idle)
        assert idle.state is not None
        assert [layer for layer, capacity in enumerate(idle.state.pool.capacities) if not capacity] == list(pairs)


def test_a_cache_goes_on_as_it_began(llm: LLM) -> None:
    shared = llm.prefill(IDS, FullKV(), max_tokens=4)
    expected = llm.decode(llm.prefill(IDS, FullKV(), max_tokens=4).cache, torch.tensor([5]))
    llm.share_layers = None
    assert torch.equal(llm.decode(shared.cache, torch.tensor([5])), expected)
    with pytest.raises(FastKVError, match="a sequence that continues from a cache"):
        llm.prefill(IDS, FullKV(), cache=shared.cache)
    own = llm.prefill(IDS, FullKV(), max_tokens=4)
    llm.share_layers = PAIRS
    llm.prefill(IDS, FullKV(), cache=own.cache)


# --- memory ---


def test_what_is_held_by_hand() -> None:
    """Of six layers of 100 tokens: layer 0 is held until layer 4, layer 1 until layer 3."""
    sources = (0, 1, 2, 1, 0, 5)
    whole = [LayerPlan(100, 10, None)] * 6
    assert held_at_most(whole, sources) == 200
    reduced = [LayerPlan(100, 10, None)] * 2 + [LayerPlan(100, 10, 30)] + [LayerPlan(30, 10, None)] * 3
    assert held_at_most(reduced, sources) == 230  # while the first of them is cut
    late = [LayerPlan(100, 10, None)] * 3 + [LayerPlan(100, 10, 30)] + [LayerPlan(30, 10, None)] * 2
    assert held_at_most(late, sources) == 230
    assert held_at_most(whole, (0, 1, 2, 3, 4, 4)) == 100


@pytest.mark.parametrize(
    "policy",
    [FullKV(), FastKV(), FastKV(tsp_layer=0), FastKV(tsp_layer=2), FastKV(tsp_rate=1), SnapKV(), AdaKV()],
    ids=lambda policy: policy.name,
)
@pytest.mark.parametrize("pairs", [{2: 1, 3: 0}, {1: 0, 2: 0}], ids=str)
def test_no_tensor_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Policy, pairs: dict[int, int]
) -> None:
    """See tests/test_footprint.py."""
    monkeypatch.setattr(footprint_module, "within_attention", lambda rows, mask, itemsize: 0)
    llm = model_of(tmp_path / "narrow", 16, 8, 2)
    llm.share_layers = pairs
    n_tokens, sources = 1100, tuple(pairs.get(layer, layer) for layer in range(4))
    llm.model.reserve(n_tokens)
    limit = position_limit(llm.config, policy, n_tokens)
    plan = plan_request(llm.config, policy, n_tokens, 0, llm.dtype, limit, shared=sources)
    said = footprint(llm.model, plan, plan.nbytes)
    ids = torch.randint(3, 64, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with Alive(llm.model) as alive:
        llm.prefill(ids, policy, max_tokens=0)
    assert 0.93 * alive.peak < said.total < 1.2 * alive.peak, (said, alive.peak)


def test_a_refusal_names_what_is_held(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.free_buffers()
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: 2**17)
    with pytest.raises(FastKVError, match=r"of whole K and V of layers that later ones read.*; leave pairs out of"):
        llm.stream([7] * 500, SamplingParams(max_tokens=4), NO_TSP)


# --- what does not go with it ---

# Their steps read few entries, they decide while a prefill runs, their layers compete, or they read a prompt twice.
REFUSED = {
    *("quest", "rocketkv", "clusterkv", "sinkrouter"),
    *("asl", "claa", "structkv"),
    *("defensivekv-layer", "kvzip"),
    "gemfilter",
}


@pytest.fixture
def nothing_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request gets as far as the model."""
    monkeypatch.setattr(llm.model, "embed", lambda *args, **settings: pytest.fail("the model ran"))


def refuses(name: str, llm: LLM) -> bool:
    """Whether a policy is refused; by a line that names the setting, before anything runs."""
    try:
        llm.stream([7] * 300, SamplingParams(max_tokens=40), POLICIES[name]())
    except FastKVError as error:
        return error.setting == "share_layers" and f"share_layers does not go with policy {name}, " in str(error)
    return False


def test_policies_that_cannot_share(llm: LLM, nothing_runs: None) -> None:
    assert {name for name in set(POLICIES) - {"headkv"} if refuses(name, llm)} == REFUSED
    llm.share_layers = None
    assert not any(refuses(name, llm) for name in REFUSED)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"headkv"} - REFUSED))
def test_policies_that_can(llm: LLM, name: str) -> None:
    """Each keeps of a reader what it keeps of its source."""
    ids = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(0))
    pre = llm.prefill(ids, POLICIES[name](), max_tokens=2)
    assert llm.decode(pre.cache, torch.tensor([9])).isfinite().all()
    assert all(torch.equal(pre.kept[reader], pre.kept[source]) for reader, source in PAIRS.items())
    assert pre.cache.layer_entries[3:] == (0, 0, 0)


def test_what_is_refused(llm: LLM, nothing_runs: None, tmp_path: Path) -> None:
    """Each in one line that names the other thing."""
    ids, params = IDS.tolist(), SamplingParams(max_tokens=40)
    llm.share_layers = None
    session = llm.session()
    llm.share_layers = PAIRS

    def in_int8() -> Any:
        llm.kv_dtype = "int8"
        try:
            return llm.stream(ids, params)
        finally:
            llm.kv_dtype = None

    calls: dict[str, Any] = {
        "sessions": lambda: llm.session(),
        "sessions: ": lambda: llm.load_session(tmp_path / "none"),
        "sessions: leave": lambda: llm.stream(session.turn(ids), params),
        "speculation": lambda: llm.stream(ids, params, speculation="ngram"),
        "speculation: ": lambda: llm.generate(ids, params, speculation="self"),
        "decode_budget": lambda: llm.stream(ids, params, decode_budget=32),
        "reuse_prefix": lambda: llm.generate([ids, ids], params, reuse_prefix=True),
        "kv_dtype": in_int8,
        "lookahead, which": lambda: llm.stream(ids, params, SnapKV(kv_len=24, lookahead=4)),
    }
    for what, call in calls.items():
        with pytest.raises(FastKVError) as caught:
            call()
        assert f"share_layers does not go with {what}" in str(caught.value)
        assert caught.value.setting == "share_layers"


def test_maps_of_a_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is this model's, and its layers are there; where not, nothing is loaded."""
    path = tmp_path / "map.json"
    content = {"kind": "fastkv-share-layers", "files": fingerprint(tiny_folder), "n_layers": 6}
    content["pairs"] = [{"reader": 4, "source": 2}]
    path.write_text(json.dumps(content))
    llm = LLM(tiny_folder, dtype="float32", device="cpu", share_layers=path)
    assert llm.share_layers == {4: 2}
    path.write_text(json.dumps({**content, "files": "0" * 16}))
    for wrong in ({6: 1}, {2: 4}, {4: 2, 5: 4}, path, tmp_path / "none", [(4, 2)]):
        with pytest.raises(FastKVError) as caught:
            llm.share_layers = wrong
        assert caught.value.setting == "share_layers"
        assert llm.share_layers == {4: 2}
    monkeypatch.setattr("fastkv.engine.loaded.load_weights", lambda *args, **settings: pytest.fail("they are loaded"))
    for wrong, settings in ((path, {}), ({4: 2}, {"prefix_cache": 1000})):
        with pytest.raises(FastKVError) as caught:
            LLM(tiny_folder, device="cpu", share_layers=wrong, **settings)
        assert caught.value.setting == "share_layers"


def test_keys_that_are_turned_otherwise(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.model.blocks[3].self_attn, "rotary", 1)
    with pytest.raises(FastKVError, match="layer 3 cannot read layer 1: the two turn keys"):
        llm.share_layers = PAIRS


def test_a_step_of_one_row_is_not_a_compiled_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those write k and v of every layer, a reader's over its source's."""
    pre = llm.prefill(IDS, FullKV(), max_tokens=2)
    expected = llm.decode(pre.cache, torch.tensor([5]))
    pre.cache.truncate(1)
    monkeypatch.setattr(llm.model, "row", "nothing that could run")
    assert torch.equal(llm.decode(pre.cache, torch.tensor([5])), expected)
    request = llm._request(IDS.tolist(), SamplingParams(max_tokens=2), FullKV())
    assert request.plan.eager == "shared layers"  # nor do graphs
