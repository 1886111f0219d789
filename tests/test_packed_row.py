"""Compiled steps over packed entries: the same as plain ones, whatever was packed, and from loops made once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape
from fastkv.cache.policies import FastKVAda
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.cache.quantised import QuantisedLayer, most_exact
from fastkv.cache.quantised_layouts import quantised
from fastkv.engine import packed_row as module
from fastkv.engine import runtime
from fastkv.engine.compiled_row import CompiledRow
from fastkv.engine.decode import decode_step
from fastkv.engine.decode_attention import EagerAttention
from fastkv.kernels import direct
from fastkv.kernels.packed_attention import packed_attention
from fastkv.kernels.packed_loops import has_words, in_words, packed_loops
from fastkv.kernels.packing import KV_DTYPES, SCHEMES, Packed, pack
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama
from fastkv.models.weights import random_weights

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 256, (350,), generator=torch.Generator().manual_seed(1)).tolist()
every_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)

Compiler = list[Any]  # the graphs that it was given


@pytest.fixture(autouse=True)
def compiler(stand_in_compiler: Compiler, traced_once: None) -> Compiler:
    return stand_in_compiler


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def llm(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """To be set to any kv_dtype. A compiled step must be one: none goes the usual way."""
    monkeypatch.setattr(tiny_llm.model, "row", CompiledRow(tiny_llm.model, {}))
    yield tiny_llm
    tiny_llm.kv_dtype = None


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blocks_of(kv_dtype: str, n_blocks: int, n_heads: int = 2, head_dim: int = 64) -> Packed:
    scheme = SCHEMES[kv_dtype]
    shapes = scheme.shapes(head_dim)
    into = Packed(*(torch.zeros(n_heads, n_blocks, *shape, dtype=dtype) for shape, dtype in shapes))
    pack(scheme, *(noise(n_heads, n_blocks * scheme.block, head_dim, seed=seed) for seed in (1, 2)), into)
    return into


def logits_of_steps(llm: LLM, cache: KVCache, steps: int) -> Tensor:
    return torch.cat([llm.decode(cache, torch.tensor([3 + step % 50])) for step in range(steps)])


# --- the loops ---


@every_dtype
@pytest.mark.parametrize(("head_dim", "n_rows"), [(64, 3), (128, 1), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loops_compute_what_the_calls_do(kv_dtype: str, head_dim: int, n_rows: int, dtype: torch.dtype) -> None:
    packed = blocks_of(kv_dtype, 3, head_dim=head_dim)
    rows, k, v = (noise(2, n, head_dim, seed=seed, dtype=dtype) for seed, n in ((3, n_rows), (4, 30), (5, 30)))
    expected = packed_attention(SCHEMES[kv_dtype], rows, packed, k, v)
    found = packed_loops(rows, in_words(packed), k, v)
    assert found.dtype == dtype
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def test_large_logits_do_not_overflow() -> None:
    packed = blocks_of("int8", 2)
    rows, k, v = (noise(2, n, 64, seed=n) * size for n, size in ((1, 1000.0), (30, 1.0), (29, 1.0)))
    found = packed_loops(rows, in_words(packed), k[:, :29], v)
    torch.testing.assert_close(found, packed_attention(SCHEMES["int8"], rows, packed, k[:, :29], v))


def test_codes_that_fill_no_word_have_no_loops() -> None:
    assert [size for size in range(2, 40, 2) if has_words(size)] == [8, 16, 24, 32]


# --- the steps ---


@every_dtype
@pytest.mark.parametrize("policy", [FullKV(), FastKV(kv_len=150)], ids=lambda each: each.name)
def test_steps_are_those_without_a_compiler(
    kv_dtype: str, policy: Policy, llm: LLM, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    """With one block, for which there are no loops, or more, and others that are packed meanwhile."""
    llm.kv_dtype = kv_dtype
    cache, plain = (llm.prefill(PROMPT, policy, 20).cache for _ in range(2))
    found = logits_of_steps(llm, cache, 20)
    assert compiler
    monkeypatch.setattr(llm.model, "row", None)
    torch.testing.assert_close(found, logits_of_steps(llm, plain, 20), atol=1e-2, rtol=1e-2)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        state, expected = layer.state(0), other.state(0)
        assert torch.equal(state["blocks"], expected["blocks"])
        for name in ("exact_k", "exact_v"):
            torch.testing.assert_close(state[name], expected[name], atol=1e-2, rtol=1e-2)  # rounded to another code


def test_loops_are_made_once_and_taken(llm: LLM, compiler: Compiler) -> None:
    """For all layers, and however many entries there come to be."""
    llm.kv_dtype = "int8"
    cache = llm.prefill(PROMPT, FullKV(), 10).cache  # one more block after 7 steps
    logits_of_steps(llm, cache, 1)
    n_layers, first = llm.config.n_layers, [each.runs for each in compiler]
    assert sorted(first) == sorted([1, n_layers, n_layers - 1, 1])  # before, attention, between, last
    logits_of_steps(llm, cache, 9)
    assert [each.runs for each in compiler] == [10 * runs for runs in first]


@every_dtype
def test_what_is_made_before_the_first_step_is_what_it_needs(kv_dtype: str, llm: LLM, compiler: Compiler) -> None:
    llm.model.row.prepare(kv_dtype=kv_dtype)
    made = len(compiler)
    llm.kv_dtype = kv_dtype
    logits_of_steps(llm, llm.prefill(PROMPT, FullKV(), 4).cache, 2)
    logits_of_steps(llm, llm.prefill(PROMPT[:20], FullKV(), 4).cache, 2)  # none of these is packed
    assert len(compiler) == made


def test_a_place_is_made_as_a_written_entry_makes_it() -> None:
    """The oldest are packed when one more would be too many, and the new one is not among them."""
    layers = []
    for _ in range(2):
        pool = KVPool(quantised(DenseLayer, "int4"), [200], 1, EntryShape(2, 8, torch.float32), CPU)
        cache = KVCache(pool, pool.take_all(), 100, 1000)
        count = most_exact(SCHEMES["int4"])
        cache.begin(whole=True, room=100)
        cache.store(0, noise(1, 2, count, 8), noise(1, 2, count, 8, seed=1), None, torch.arange(count).expand(1, 2, -1))
        cache.end(count, 1000)
        layers.append((cache, pool.layers[0]))
    k, v = noise(1, 2, 1, 8, seed=2), noise(1, 2, 1, 8, seed=3)
    (one, written), (other, row) = layers
    written.write(one.slots, k, v, one.pool.places(one.slots, 1)[0])
    assert isinstance(row, QuantisedLayer)
    assert len(row.row(0)) == 6
    for exact, new in zip(row.row(0)[-2:], (k, v), strict=True):  # asked twice, nothing more is packed
        exact[:, :, -1:] = new
    for cache in (one, other):
        cache.advance()
    state, expected = row.state(0), written.state(0)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", ["one", "several tokens", "heads of different lengths", "a window", "half words"])
def test_which_steps_are_compiled(case: str, llm: LLM) -> None:
    llm.kv_dtype = "int8"
    policy = FastKVAda(min_tokens=8) if case == "heads of different lengths" else FullKV()
    cache = llm.prefill(PROMPT, policy, 4).cache
    windows = [5 if case == "a window" else None] * llm.config.n_layers
    pool: Any = cache.pool
    if case == "half words":
        pool = SimpleNamespace(**{**vars(pool), "shape": EntryShape(2, 12, torch.float32)}, places=pool.places)
    attention = EagerAttention(pool, [cache.slots], 2 if case == "several tokens" else 1, windows)
    assert attention.is_one_row is (case == "one")


def test_slow_steps_alone_are_told(llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._runtime, "_said_eager", False)
    llm.kv_dtype = "int8"
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for policy in (FullKV(), FastKVAda(min_tokens=8)):  # attention of unlike heads never is, with or without kv_dtype
        llm.generate(PROMPT, params, policy)
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    monkeypatch.setattr(runtime, "can_be_one_row", lambda *_: False)  # as where there are windows
    llm.generate(PROMPT, params, FullKV())
    assert "answers with int8 entries have attention that is not compiled, which is slower" in caplog.text


# --- the faster way ---


@pytest.mark.parametrize("taken", ["loops", "calls"])
def test_the_way_that_was_measured_is_taken(taken: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all layers and numbers of entries up to a power of two; what is timed is what will run."""
    asked: list[str] = []

    def choose(what: str, default: str, names: Any, ways: Any) -> str:
        asked.append(what)
        assert set(ways()) == set(names) == {"loops", "calls"}
        assert default == "loops"
        for way in ways().values():
            way()
        return taken

    llm.kv_dtype = "int8"
    cache = llm.prefill(PROMPT, FullKV(), 4).cache
    logits_of_steps(llm, cache, 1)
    monkeypatch.setattr(module, "is_on", lambda: True)
    monkeypatch.setattr(module, "calibration", lambda: SimpleNamespace(choose=choose))
    monkeypatch.setattr(module, "_COLD", 2**14)
    row = llm.model.row
    assert isinstance(row, CompiledRow)
    row._packed._ways.clear()
    called: list[int] = []
    by_calls = module.by_calls
    monkeypatch.setattr(module, "by_calls", lambda *inputs: called.append(1) or by_calls(*inputs))
    logits_of_steps(llm, cache, 1)
    timed = len(called)
    logits_of_steps(llm, cache, 1)
    assert len(asked) == 1
    assert asked[0].startswith("compiled attention over int8 entries, ")
    assert len(called) - timed == (0 if taken == "loops" else llm.config.n_layers)


def test_without_a_compiler_that_works_it_goes_on_by_calls(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def broken(*_: Any) -> None:
        raise RuntimeError("no such pass")

    llm.kv_dtype = "int8"
    monkeypatch.setattr(direct, "_built", broken)
    found = logits_of_steps(llm, llm.prefill(PROMPT, FullKV(), 4).cache, 3)
    monkeypatch.setattr(llm.model, "row", None)
    expected = logits_of_steps(llm, llm.prefill(PROMPT, FullKV(), 4).cache, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert caplog.text.count("slower for it: no such pass") == 1


# --- models of other shapes ---


def network(n_heads: int = 6, n_kv_heads: int = 2, head_dim: int = 16, **changes: Any) -> Llama:
    settings = {"n_layers": 3, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, **changes}
    dtype = settings.pop("torch_dtype", torch.float32)
    model = random_weights(ModelConfig("MistralForCausalLM", 60, 24, 40, context_length=2048, **settings), dtype, CPU)
    model.reserve(1000)
    return model


def filled(model: Llama, kv_dtype: str, count: int = 250) -> KVCache:
    """A cache of noise, in the second slot of a pool."""
    config = model.config
    shape = EntryShape(config.n_kv_heads, config.head_dim, model.dtype)
    pool = KVPool(quantised(DenseLayer, kv_dtype), [400] * config.n_layers, 2, shape, CPU)
    cache = KVCache(pool, range(1, 2), 100, 1000)
    cache.begin(whole=True, room=100)
    size = (1, config.n_kv_heads, count, config.head_dim)
    for layer in range(config.n_layers):
        k, v = (noise(*size, seed=2 * layer + at, dtype=model.dtype) for at in (0, 1))
        cache.store(layer, k, v, None, torch.arange(count).expand(1, config.n_kv_heads, -1))
    cache.end(count, 1000)
    return cache


def steps(model: Llama, cache: KVCache, row: CompiledRow | None, count: int = 3) -> Tensor:
    model.row = row
    return torch.cat([decode_step(model, cache, torch.tensor([[token]])) for token in range(3, 3 + count)])


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 1},
        {"n_kv_heads": 6, "head_dim": 40},
        {"torch_dtype": torch.bfloat16},
        {"sliding_windows": (None, 30, None)},
        {"head_dim": 12},
    ],
    ids=["one KV head", "as many", "bfloat16", "a window", "half words"],
)
@every_dtype
def test_every_shape(kv_dtype: str, changes: dict[str, Any], compiler: Compiler) -> None:
    """What is made ahead is what these steps need, with loops or without."""
    model = network(**changes)
    row = CompiledRow(model, {})
    row.prepare(kv_dtype=kv_dtype)
    made = len(compiler)
    bound = 2e-3 if model.dtype == torch.float32 else 0.1
    found, expected = (steps(model, filled(model, kv_dtype), which) for which in (row, None))
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    assert len(compiler) == made
    loops = has_words(model.config.head_dim) and "sliding_windows" not in changes
    assert sum(each.runs > 0 for each in compiler) == (4 if loops else 3)


def test_after_forgetting_and_in_another_slot(compiler: Compiler) -> None:
    model = network()
    caches, found = [filled(model, "int8") for _ in range(2)], []
    for cache, row in zip(caches, (CompiledRow(model, {}), None), strict=True):
        first = steps(model, cache, row, 20)
        cache.truncate(15)
        found.append(torch.cat((first, steps(model, cache, row, 40))))
    torch.testing.assert_close(*found, atol=2e-3, rtol=2e-3)
    assert compiler


def test_a_step_that_failed_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was packed to make room for it stays packed, and is packed once."""
    model = network()
    row, caches = CompiledRow(model, {}), [filled(model, "int8", most_exact(SCHEMES["int8"])) for _ in range(2)]
    expected = steps(model, caches[0], row)

    def broken(*_: Any) -> Any:
        raise RuntimeError("interrupted")

    layer = row._layer
    monkeypatch.setattr(row, "_layer", broken)
    with pytest.raises(RuntimeError, match="interrupted"):
        steps(model, caches[1], row, 1)
    monkeypatch.setattr(row, "_layer", layer)
    torch.testing.assert_close(steps(model, caches[1], row), expected)


def test_too_many_queries_for_one_loop_go_by_calls(compiler: Compiler) -> None:
    """The loop would be written out for each of them, and take minutes to compile."""
    model = network(n_heads=26, n_kv_heads=1, head_dim=8)
    found, expected = (steps(model, filled(model, "int8"), row) for row in (CompiledRow(model, {}), None))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    assert len(compiler) == 3  # before, between, after: no attention
