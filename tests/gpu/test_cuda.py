"""What only a GPU can show: captured graphs replay the eager step, nothing waits for the host, memory is reused.

    pytest tests/gpu

Skipped where torch sees no CUDA device; continuous integration has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from fastkv import (
    ASL,
    LLM,
    AdaKV,
    Compactor,
    ExpectedAttention,
    FastKV,
    FullKV,
    GemFilter,
    KeyDiff,
    KVzip,
    SamplingParams,
    StructKV,
)
from fastkv.cache.dense import DenseLayer
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.cache.scores import window_attention
from fastkv.engine import prefill as prefill_module
from fastkv.engine.attention import attend_from, causal_attention
from fastkv.engine.decode_attention import MaskedAttention, VarlenAttention, graph_attention
from fastkv.engine.graph import GraphStepper
from fastkv.engine.merged_attention import merged_attention, why_not_merged
from fastkv.errors import FaultError
from fastkv.kernels.key_products import has_float32_products, products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

ARCHIVE = ROOT / "examples" / "archive" / "model"
PROMPT = torch.randint(10, 1000, (3000,), generator=torch.Generator().manual_seed(5)).tolist()
POLICIES = [FullKV(), FastKV(), FastKV(tsp_layer=2, tsp_len=200, kv_len=1000), AdaKV(), GemFilter(), ASL(), StructKV()]
NAMES = ["full", "fastkv", "layers differ", "heads differ", "gemfilter", "asl", "structkv"]
AGNOSTIC = [KeyDiff(), KeyDiff(budgets="model"), Compactor(), ExpectedAttention(), KVzip(chunk=512)]
# bfloat16 carries 8 bits: two orders of the same sums differ by about this share of a logit
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest) -> tuple[LLM, LLM]:
    """The bundled model (with graphs, without)."""
    return (
        LLM(ARCHIVE, dtype=request.param, device="cuda"),
        LLM(ARCHIVE, dtype=request.param, device="cuda", cuda_graph=False),
    )


def random_model(folder: Path, **more: Any) -> LLM:
    """Random weights in the proportions of a large model: heads of 128, groups of 4, bfloat16."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 65_536,
        "rms_norm_eps": 1e-5,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(folder, dtype="bfloat16", device="cuda", load_format="dummy")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return random_model(tmp_path_factory.mktemp("wide"))


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stepper_of(llm: LLM) -> GraphStepper:
    idle = llm._runtime.buffers._idle
    assert idle is not None
    assert isinstance(idle.stepper, GraphStepper), "decoding was not replayed"
    return idle.stepper


CHOICES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 1.2, "seed": 4, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_logits_of_replayed_steps_are_the_eager_ones(pair: tuple[LLM, LLM], policy: Policy) -> None:
    graphs, eager = pair
    name = str(eager.dtype).removeprefix("torch.")
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    for prompt in (PROMPT, PROMPT[:2700]):  # the second is served by what the first recorded
        tokens = graphs.generate(prompt, params, policy).token_ids
        pre = eager.prefill(prompt, policy, 24)
        logits = pre.logits
        for token in tokens[:-1]:
            logits = eager.decode(pre.cache, torch.tensor([token]))
        torch.testing.assert_close(stepper_of(graphs)._logits, logits, atol=TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("policy", [FullKV(), AdaKV()], ids=["full", "heads differ"])
def test_layers_with_a_sliding_window_are_replayed(tmp_path: Path, policy: Policy) -> None:
    llm = random_model(tmp_path, architectures=["MistralForCausalLM"], sliding_window=4096)
    tokens = llm.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True), policy).token_ids
    pre = llm.prefill(PROMPT, policy, 24)
    logits = pre.logits
    for token in tokens[:-1]:
        logits = llm.decode(pre.cache, torch.tensor([token]))
    torch.testing.assert_close(stepper_of(llm)._logits, logits, atol=TOLERANCE["bfloat16"], rtol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_replayed_tokens_are_the_eager_ones(policy: Policy, choice: dict[str, Any]) -> None:
    """In float32, where the two orders of a sum hardly ever change which token is best."""
    graphs, eager = (LLM(ARCHIVE, dtype="float32", device="cuda", cuda_graph=on) for on in (True, False))
    params = SamplingParams(max_tokens=40, ignore_eos=True, **choice)
    for prompt in (PROMPT, PROMPT[100:]):
        assert graphs.generate(prompt, params, policy).token_ids == eager.generate(prompt, params, policy).token_ids


def test_one_graph_serves_prompts_of_other_lengths(wide: LLM) -> None:
    wide.free_buffers()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    ids = torch.randint(32_000, (9000,), generator=torch.Generator().manual_seed(0)).tolist()
    wide.generate(ids, params, FastKV())
    recorded = dict(stepper_of(wide)._steps)
    for n_tokens in (8900, 8950, 8960):  # all keep 890 … 896 entries, in the same bucket
        wide.generate(ids[:n_tokens], params, FastKV())
    assert stepper_of(wide)._steps == recorded


@pytest.mark.parametrize("layout", [DenseLayer, PerHeadLayer], ids=["dense", "per head"])
@pytest.mark.parametrize("n", [1, 3])
@torch.inference_mode()
def test_varlen_attention_is_what_runs_and_equals_the_masked_one(layout: type[KVLayer], n: int) -> None:
    device, capacities = torch.device("cuda"), (4096, 512)
    pool = KVPool(layout, capacities, 3, EntryShape(4, 128, torch.bfloat16), device)
    for layer in pool.layers:
        for rows in layer.flat() or ():
            rows.normal_()
    kind, reason = graph_attention(pool, 16)
    assert kind is VarlenAttention, reason
    spans = capacities if layout is DenseLayer else (4 * 4096, 4 * 512)
    varlen, masked = (way(pool, n, spans, [None, None]) for way in (VarlenAttention, MaskedAttention))
    for lengths in ([0, 0], [1, 511], [900, 40], [4095, 300]):
        pool.lengths.copy_(torch.tensor(lengths)[:, None, None])
        pool.lengths[:, 1] //= 2
        varlen.begin()
        for layer_index in range(2):
            q = torch.randn(n, 16, 1, 128, dtype=torch.bfloat16, device=device)
            found, expected = (way.attend(layer_index, q) for way in (varlen, masked))
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("policy", [FullKV(), FastKV(), AdaKV()], ids=["full", "fastkv", "heads differ"])
def test_a_replayed_batch_gives_each_what_it_gets_alone(policy: Policy) -> None:
    """In float32; prompts of all lengths, which choose their tokens in all ways, and end at different times."""
    graphs, eager = (LLM(ARCHIVE, dtype="float32", device="cuda", cuda_graph=on) for on in (True, False))
    prompts = [PROMPT[: 300 * (index + 1)] for index in range(6)]
    params = [
        SamplingParams(max_tokens=8 + 5 * index, ignore_eos=True, **CHOICES[index % len(CHOICES)]) for index in range(6)
    ]
    alone = [eager.generate(prompt, each, policy).token_ids for prompt, each in zip(prompts, params, strict=True)]
    together = graphs.generate(prompts, params, policy, batch_size=4)
    assert [out.token_ids for out in together] == alone


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_replayed_step_never_waits_for_the_host(wide: LLM, choice: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=32, ignore_eos=True, **choice)
    ids = torch.randint(32_000, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = wide.stream(ids, params)
    for _ in range(3):
        next(stream)
    batch = stream._batch
    assert batch is not None
    caches = {slot: each.cache for slot, each in batch._at_work.items()}
    with no_waiting():
        for _ in range(4):
            batch._step(caches)


def test_stopping_never_emits_a_token_too_many(wide: LLM) -> None:
    ids = torch.randint(32_000, (2000,), generator=torch.Generator().manual_seed(3)).tolist()
    tokens = wide.generate(ids, SamplingParams(max_tokens=12, ignore_eos=True)).token_ids
    stream = wide.stream(ids, SamplingParams(max_tokens=12))
    stop = tokens[5]
    object.__setattr__(stream._answer.request, "eos_ids", frozenset({stop}))
    assert [piece.token_id for piece in stream] == tokens[: tokens.index(stop) + 1]


def test_the_second_request_allocates_nothing_of_its_size(wide: LLM) -> None:
    ids = torch.randint(32_000, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for _ in range(2):  # the capture empties torch's own cache of memory once
        wide.generate(ids, params)
    before = torch.cuda.memory_stats()
    wide.generate(ids[:19_900], params)  # the same bucket of entries
    wide.generate(ids, params)
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert after["reserved_bytes.all.peak"] == before["reserved_bytes.all.peak"]


def test_peak_memory_is_the_sum_of_its_parts(wide: LLM) -> None:
    """Weights, kept entries, one layer's K/V, and activations: three of the hidden states' size and a chunk's MLP."""
    wide.free_buffers()
    torch.cuda.empty_cache()
    n_tokens, config = 60_000, wide.config
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(32_000, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    metrics = wide.generate(ids, SamplingParams(max_tokens=2, ignore_eos=True), FastKV()).metrics
    assert metrics.peak_bytes is not None
    kv = 2 * n_tokens * 2 * config.n_kv_heads * config.head_dim
    hidden = 2 * n_tokens * config.hidden_size
    scoring = 4 * 8 * n_tokens * config.n_heads
    chunk = 2 * 4096 * 4 * config.intermediate_size
    rest = metrics.peak_bytes - weights - metrics.kv_bytes - kv
    assert rest < 1.5 * (3 * hidden + 2 * kv + 3 * scoring + chunk)  # 2 kv: a copy of K and V that is padded for cuDNN


@pytest.mark.parametrize("policy", [*POLICIES, *AGNOSTIC], ids=lambda policy: policy.name)
def test_a_prefill_is_that_of_the_cpu(policy: Policy) -> None:
    """Selections up to ties: which of two equal scores wins is the device's affair, and so are the lengths of heads."""
    cpu, gpu = (LLM(ARCHIVE, dtype="float32", device=device) for device in ("cpu", "cuda"))
    expected, found = cpu.prefill(PROMPT, policy), gpu.prefill(PROMPT, policy)
    if isinstance(policy, FullKV):
        torch.testing.assert_close(found.logits.cpu(), expected.logits, atol=2e-2, rtol=0)
    for layer in range(cpu.config.n_layers):
        ours, theirs = found.kept[layer].cpu(), expected.kept[layer]
        assert ours.shape[:2] == theirs.shape[:2]  # padded to the longest head, which may differ by a tie
        for head in range(ours.shape[1]):
            ours_kept, theirs_kept = (set(of[0, head].tolist()) - {-1} for of in (ours, theirs))  # -1 is padding
            assert len(ours_kept & theirs_kept) >= 0.97 * len(theirs_kept) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 4), 128), ((8, 8), 64)], ids=str)
@torch.inference_mode()
def test_merged_attention_is_what_runs_and_equals_the_masked_one(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    torch.manual_seed(0)
    device, n_tokens = torch.device("cuda"), 9001
    assert why_not_merged(heads[0] // heads[1], head_dim, dtype, device) is None
    indices = torch.stack([torch.randperm(n_tokens, device=device)[:2100].sort().values for _ in range(2)])
    indices[0, :1500] = torch.arange(1500, device=device)  # adjacent, from the first one on, then a gap
    indices[0, 1500:] = torch.arange(n_tokens - 600, n_tokens, device=device)
    shapes = [(2, count, tokens, head_dim) for count, tokens in zip(heads, (2100, n_tokens), strict=True)]
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in (*shapes, shapes[1]))
    expected = attend_from(indices, q.float(), k.float(), v.float())
    torch.testing.assert_close(merged_attention(indices, q, k, v).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_keys_are_multiplied_as_they_are(dtype: torch.dtype, batch: int) -> None:
    """Into float32 sums, from memory that K and V share."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    assert has_float32_products(dtype, device)
    k, _ = torch.randn(batch, 8, 3001, 128, device=device).to(dtype).chunk(2, dim=1)
    rows = torch.randn(batch, 4, 32, 128, device=device).to(dtype)
    expected = rows.double() @ k.double().transpose(-1, -2)
    torch.testing.assert_close(products(rows, k).double(), expected, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_scores_need_no_float32_copy_of_the_keys() -> None:
    torch.cuda.empty_cache()
    k, q = (torch.randn(1, heads, 100_000, 128, device="cuda").bfloat16() for heads in (8, 32))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = window_attention(q, k, 8)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * weights.nbytes + k.nbytes  # a float32 copy would be twice the keys


@pytest.mark.parametrize("n_tokens", [1000, 17_000, 17_408])
@torch.inference_mode()
def test_cudnn_gets_lengths_that_come_again_and_gives_the_same(n_tokens: int) -> None:
    """Where a prefill's memory holds NaN after the tokens."""
    heads = torch.randn(1, 24, n_tokens + 100, 128, device="cuda").bfloat16()
    heads[:, :, n_tokens:] = torch.nan
    q, k, v = heads[:, :, :n_tokens].split((16, 4, 4), dim=1)
    try:
        found = causal_attention(q, k, v, backend="cudnn")
    except RuntimeError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(found, causal_attention(q, k, v, backend="flash"), atol=0.02, rtol=0.02)
    torch.testing.assert_close(found, causal_attention(q, k, v), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("policy", [FastKV(), StructKV()], ids=["fastkv", "structkv"])
def test_propagated_tokens_alone_are_what_all_tokens_give(
    wide: LLM, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    """At the TSP layer of a long prompt, or in each layer that may be one."""
    ids = torch.randint(32_000, (9000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(prefill_module, "_MERGED_FROM", 10_000)
    expected = wide.prefill(ids, policy).logits
    monkeypatch.setattr(prefill_module, "_MERGED_FROM", 1)
    torch.testing.assert_close(wide.prefill(ids, policy).logits, expected, atol=TOLERANCE["bfloat16"], rtol=0)


def test_attention_backends_agree() -> None:
    logits = {}
    for backend in ("auto", "cudnn", "flash", "math"):
        try:
            llm = LLM(ARCHIVE, dtype="bfloat16", device="cuda", attention=backend)
        except ValueError as error:
            print(error)
            continue
        logits[backend] = llm.prefill(PROMPT, FullKV()).logits
    assert {"auto", "flash", "math"} <= set(logits)
    for found in logits.values():
        torch.testing.assert_close(found, logits["math"], atol=TOLERANCE["bfloat16"], rtol=0)


def test_compiled_layers_give_the_eager_tokens() -> None:
    try:
        compiled = LLM(ARCHIVE, dtype="float32", device="cuda", compile=True)
    except ValueError as error:
        pytest.skip(str(error))
    plain = LLM(ARCHIVE, dtype="float32", device="cuda")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert compiled.generate(PROMPT, params).token_ids == plain.generate(PROMPT, params).token_ids


def test_a_decode_budget_drops_what_it_drops_on_a_cpu() -> None:
    """At the first eviction, up to ties: sums are rounded otherwise there, and so later tokens may differ."""
    params, found = SamplingParams(max_tokens=40, ignore_eos=True), []
    for device in ("cuda", "cpu"):
        llm = LLM(ARCHIVE, dtype="float32", device=device)
        stream = llm.stream(PROMPT[:300], params, decode_budget=64)
        tokens = [next(stream).token_id for _ in range(18)]  # 128 are kept of the prompt, and 16 more before it
        assert stream._batch is not None
        cache = stream._batch._at_work[stream._slot].cache
        found.append((tokens, [cache.positions(layer).cpu() for layer in range(llm.config.n_layers)]))
        stream.close()
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert theirs.shape[2] < 128  # something went
        for head in range(theirs.shape[1]):
            ours_kept, theirs_kept = (set(of[0, head].tolist()) for of in (ours, theirs))
            assert len(ours_kept & theirs_kept) >= 0.9 * len(theirs_kept)


def test_the_bundled_example(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "archive" / "prompt.txt").read_text().removesuffix("\n")
    answer = (ROOT / "examples" / "archive" / "answer.txt").read_text().strip()
    llm = LLM(ARCHIVE, device="cuda")
    for policy in (FullKV(), FastKV()):
        assert llm.generate(text, policy=policy).text == f" {answer}.\n"


@pytest.mark.parametrize("policy", [FullKV(), AdaKV()], ids=["full", "heads differ"])
def test_going_on_in_pieces(pair: tuple[LLM, LLM], policy: Policy) -> None:
    """Flash attention aligned to the end in bfloat16, masked attention over repeated heads in float32."""
    llm = pair[1]
    name = str(llm.dtype).removeprefix("torch.")
    ids = torch.tensor([PROMPT])
    whole = llm.prefill(ids[:, :2000], policy, 1100)
    pre = llm.prefill(ids[:, :2000], policy, 16)
    for piece in ids[:, 2000:].split((1, 300, 699), dim=1):
        pre = llm.prefill(piece, policy, 16, cache=pre.cache)
    logits = llm.decode(whole.cache, ids[:, 2000:])[:, -1]
    torch.testing.assert_close(pre.logits, logits, atol=TOLERANCE[name], rtol=0)
    if isinstance(policy, FullKV):
        torch.testing.assert_close(pre.logits, llm.prefill(ids, policy).logits, atol=TOLERANCE[name], rtol=0)


def test_a_sliding_window_goes_on(tmp_path: Path) -> None:
    llm = random_model(tmp_path, architectures=["MistralForCausalLM"], sliding_window=512)
    ids = torch.tensor([PROMPT])
    whole, pre = llm.prefill(ids, FullKV(), 8), llm.prefill(ids[:, :1500], FullKV(), 8)
    pre = llm.prefill(ids[:, 1500:], FullKV(), 8, cache=pre.cache)
    torch.testing.assert_close(pre.logits, whole.logits, atol=TOLERANCE["bfloat16"], rtol=0)


def test_several_tokens_in_a_step_and_back(wide: LLM) -> None:
    ids = torch.randint(32_000, (1, 3000), generator=torch.Generator().manual_seed(0))
    new = ids[:, :6]
    one, many = (wide.prefill(ids, FastKV(), 16).cache for _ in range(2))
    slow = torch.stack([wide.decode(one, new[:, index]) for index in range(6)], dim=1)
    torch.testing.assert_close(wide.decode(many, new), slow, atol=TOLERANCE["bfloat16"], rtol=0)
    many.truncate(6)
    torch.testing.assert_close(wide.decode(many, new), slow, atol=TOLERANCE["bfloat16"], rtol=0)


def test_models_without_groups_are_replayed(tmp_path: Path) -> None:
    llm = random_model(tmp_path, num_key_value_heads=16)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    tokens = llm.generate(PROMPT, params, FastKV()).token_ids
    pre = llm.prefill(PROMPT, FastKV(), 16)
    logits = pre.logits
    for token in tokens[:-1]:
        logits = llm.decode(pre.cache, torch.tensor([token]))
    torch.testing.assert_close(stepper_of(llm)._logits, logits, atol=TOLERANCE["bfloat16"], rtol=0)


def test_logits_that_are_not_finite_end_a_request(tmp_path: Path) -> None:
    llm = random_model(tmp_path)
    llm.model.norm.weight.fill_(torch.inf)
    with pytest.raises(FaultError, match="NaN or infinite in bfloat16"):
        llm.generate(PROMPT[:100], SamplingParams(max_tokens=8, ignore_eos=True))
