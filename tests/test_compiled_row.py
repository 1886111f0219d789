"""A row's step as few compiled functions: the same as the plain steps, compiled once for layers that are alike.

The compiler itself is left out but for test_compile.py: what it is given runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor
from torch import Tensor

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape
from fastkv.cache.policies import FastKVAda
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.engine import compiled_row as module
from fastkv.engine.compiled_row import CompiledRow
from fastkv.engine.decode import decode_step
from fastkv.engine.direct import DirectCompiler, recorded
from fastkv.models.config import ModelConfig
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama
from fastkv.models.weights import random_weights

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite")
LAYERS = 4
PROMPT = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()

Compiler = list[Any]  # the graphs that it was given


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Stands in for torch's: the graph itself is what it makes."""
    graphs: Compiler = []

    def made(graph: Any, examples: Sequence[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
        assert len(examples) == sum(node.op == "placeholder" for node in graph.graph.nodes)
        assert not any(node.op == "get_attr" for node in graph.graph.nodes)  # no layer's weights stay in it
        graphs.append(SimpleNamespace(graph=graph, runs=0))
        mine = graphs[-1]

        def run(*inputs: Tensor) -> Any:
            mine.runs += 1
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch._inductor, "compile", made)
    return graphs


def network(family: str = "Llama", **changes: Any) -> Llama:
    settings = {"n_layers": LAYERS, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16, "context_length": 2048}
    config = ModelConfig(f"{family}ForCausalLM", 60, 24, 40, **{**settings, **changes})
    model = random_weights(config, torch.float32, torch.device("cpu"))
    model.reserve(1000)
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_inputs(n: int = 37, room: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, q, and k and v of n entries in a memory with room for more."""
    k, v = noise(2, 1, 2, n + room, 16, seed=2)[:, :, :, :n]
    return noise(1, 1, 24), noise(1, 6, 1, 16, seed=1), k, v


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def compiled_llm(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(tiny_llm.model, "row", CompiledRow(tiny_llm.model, {}))
    return tiny_llm


# --- the same as the plain steps ---


def plain(model: Llama, layer: int, inputs: tuple[Tensor, ...], rope: Rope) -> tuple[Tensor, ...]:
    """Softmax attention as its definition has it, then the steps of the blocks."""
    hidden, q, k, v = inputs
    keys, values = (each.repeat_interleave(3, dim=1) for each in (k, v))
    attended = ((q @ keys.transpose(2, 3)) / 4).softmax(-1) @ values
    hidden = hidden.clone()
    if layer == LAYERS - 1:
        return (model.last(hidden, attended),)
    return hidden, *model.between(layer, hidden, attended, rope)


# 1,500 entries: by torch's own attention.
@pytest.mark.parametrize(("family", "n"), [*((family, 37) for family in FAMILIES), ("Llama", 2), ("Llama", 1500)])
def test_every_family_computes_what_it_does_in_plain_steps(family: str, n: int, compiler: Compiler) -> None:
    model = network(family)
    row, rope, inputs = CompiledRow(model, {}), model.rope(torch.tensor([[n]])), row_inputs(n)
    before = [each.clone() for each in inputs]
    for layer in range(LAYERS):
        expected = plain(model, layer, inputs, rope)
        found = row.between(layer, *inputs, rope) if layer < LAYERS - 1 else (row.last(*inputs),)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, inputs, before))
    assert [each.runs for each in compiler] == [LAYERS - 1, 1]


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8), FastKVAda(min_tokens=8)])
def test_decoding_gives_the_tokens_of_plain_steps(
    policy: Policy, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = tiny_llm.generate(PROMPT, params, policy).token_ids
    monkeypatch.setattr(tiny_llm.model, "row", CompiledRow(tiny_llm.model, {}))
    assert tiny_llm.generate(PROMPT, params, policy).token_ids == expected
    assert bool(compiler) is (not isinstance(policy, FastKVAda))  # heads of different lengths go the usual way


def test_only_a_single_row_goes_this_way(compiled_llm: LLM, compiler: Compiler) -> None:
    batch = compiled_llm.prefill(torch.tensor([PROMPT, PROMPT]), FullKV())
    compiled_llm.decode(batch.cache, torch.tensor([5, 6]))
    one = compiled_llm.prefill(PROMPT, FullKV())
    compiled_llm.decode(one.cache, torch.tensor([[5, 6]]))
    assert not compiler
    compiled_llm.decode(one.cache, torch.tensor([7]))
    assert len(compiler) == 2


@pytest.mark.parametrize("window", [4, 100])
def test_a_sliding_window_hides_what_came_before(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("Mistral", sliding_windows=(None, window, None, window))
    expected, found = (decoded(model, row) for row in (None, CompiledRow(model, {})))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def decoded(model: Llama, row: CompiledRow | None, steps: int = 3) -> Tensor:
    """Logits of some steps after 30 entries of noise."""
    pool = KVPool(DenseLayer, [64] * LAYERS, 1, EntryShape(2, 16, torch.float32), model.device)
    cache = KVCache(pool, pool.take_all(), 0, 1000)
    cache.begin(whole=True, room=steps)
    for layer in range(LAYERS):
        k, v = noise(2, 1, 2, 30, 16, seed=layer)
        cache.store(layer, k, v, None, torch.arange(30))
    cache.end(30, 1000)
    model.row = row
    return torch.cat([decode_step(model, cache, torch.tensor([[token]])) for token in range(3, 3 + steps)])


def test_int8_weights(tiny_folder: Path, compiler: Compiler) -> None:
    llm = LLM(tiny_folder, dtype="float32", device="cpu", weights="int8")
    prefilled = [llm.prefill(PROMPT, FullKV()) for _ in range(2)]
    expected = llm.decode(prefilled[0].cache, torch.tensor([5]))
    llm.model.row = CompiledRow(llm.model, {})
    torch.testing.assert_close(llm.decode(prefilled[1].cache, torch.tensor([5])), expected, atol=1e-2, rtol=1e-2)
    assert any(
        "int8" in str(node.meta["val"].dtype) for node in compiler[0].graph.graph.nodes if node.op == "placeholder"
    )


# --- compiled once ---


def recording(model: Llama, layer: int) -> tuple[str, list[Tensor]]:
    row, rope = CompiledRow(model, {}), model.rope(torch.tensor([[7]])).rotations[0]
    return recorded(row._function(layer, "loops"), (*row_inputs(), rope.cos, rope.sin))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_alike_are_recorded_alike(family: str) -> None:
    model = network(family)
    (first, weights), (second, others) = (recording(model, layer) for layer in (0, 1))
    assert first == second
    known = {id(each) for layer in (0, 1) for each in model.blocks[layer].parameters()}
    assert {id(each) for each in weights} <= known
    assert not {id(each) for each in others} <= known  # those of layer 2 besides


def test_what_differs_but_in_weights_is_recorded_differently() -> None:
    model = network()
    norm: Any = model.blocks[0].post_attention_layernorm  # type: ignore[attr-defined]
    norm.eps = 0.5
    assert recording(model, 0)[0] != recording(model, 1)[0]
    assert recording(model, 1)[0] == recording(model, 2)[0]
    mlp: Any = model.blocks[2].feed_forward
    mlp.activation = torch.relu
    assert recording(model, 1)[0] != recording(model, 2)[0]


def test_nothing_is_compiled_twice(compiled_llm: LLM, compiler: Compiler) -> None:
    """Neither for a longer sequence or another policy, nor for another layer; for more threads it is."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for prompt, policy in ((PROMPT, FullKV()), (PROMPT[:50], FullKV()), (PROMPT, FastKV(min_tokens=8))):
        compiled_llm.generate(prompt, params, policy)
    assert len(compiler) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        compiled_llm.generate(PROMPT, params, FullKV())
    finally:
        torch.set_num_threads(threads)
    assert len(compiler) == 4


# --- what does not fit ---


def unfit(inputs: tuple[Tensor, ...], change: str) -> tuple[Tensor, ...]:
    hidden, q, k, v = inputs
    if change == "values have another number of entries":
        return hidden, q, k, v[:, :, 1:]
    if change == "other strides":
        return hidden, q, k.transpose(2, 3).contiguous().transpose(2, 3), v
    return hidden, q, *(torch.cat((each, each), dim=1) for each in (k, v))  # more heads


@pytest.mark.parametrize("change", ["values have another number of entries", "other strides", "more heads"])
def test_other_sizes_do_not_fit(change: str) -> None:
    row = CompiledRow(network(), {})
    code, _ = row._compiled(LAYERS - 1, "loops", row_inputs())
    fitting, other = row_inputs(50, room=9), unfit(row_inputs(50), change)
    assert code.fits({2: fitting[2], 3: fitting[3]})
    assert not code.fits({2: other[2], 3: other[3]})


def test_where_sizes_do_not_fit_it_runs_as_it_is(compiler: Compiler) -> None:
    model = network()
    row, rope = CompiledRow(model, {}), model.rope(torch.tensor([[37]]))
    inputs = unfit(row_inputs(), "other strides")
    expected = plain(model, 0, inputs, rope)
    for one, other in zip(row.between(0, *inputs, rope), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [each.runs for each in compiler] == [0]


def test_inputs_with_gaps_are_closed(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code takes them for what they were when it was compiled, and does not look."""
    model = network()
    row, rope = CompiledRow(model, {}), model.rope(torch.tensor([[37]]))
    hidden, q, k, v = row_inputs()
    spread = torch.zeros(1, 6, 1, 32)[..., ::2]
    row._compiled(0, "loops", (hidden, q, k, v, rope.rotations[0].cos, rope.rotations[0].sin))
    code, _ = row._known[0, "loops", torch.get_num_threads()]
    given: list[Tensor] = []
    monkeypatch.setattr(code, "run", lambda *inputs: given.extend(inputs) or (hidden, q, k, v))
    row.between(0, hidden, spread.copy_(q), k, v, rope)
    assert given[1].stride() == (96, 16, 16, 1)


def test_a_compiler_that_fails_is_told_once(
    compiled_llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row, compiled_llm.model.row = compiled_llm.model.row, None
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    expected = compiled_llm.generate(PROMPT, params, FullKV()).token_ids

    def broken(*_: Any, **named: Any) -> None:
        raise RuntimeError("\nno such pass\nand a page more")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    compiled_llm.model.row = row
    assert compiled_llm.generate(PROMPT, params, FullKV()).token_ids == expected
    (told,) = (record.getMessage() for record in caplog.records if record.name.startswith("fastkv"))
    assert told.endswith("slower for it: no such pass")


def test_a_weight_that_the_graph_lacks_is_an_error(compiler: Compiler) -> None:
    """A constant that is made anew at each call is no weight."""
    with pytest.raises(ValueError, match="unpack"):
        DirectCompiler({}).compiled(lambda x: (x + torch.tensor([1.0, 2.0]),), [noise(3, 2)], None)


# --- attention by the fastest way ---


@pytest.mark.parametrize("taken", ["loops", "fused"])
def test_the_way_that_was_measured_is_taken(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all layers and numbers of entries up to a power of two; what is timed is what will run."""
    asked: list[str] = []

    def choose(what: str, default: str, names: Any, ways: Any) -> str:
        asked.append(what)
        assert set(ways()) == {"loops", "fused"} <= set(names)
        assert default == "loops"
        for way in ways().values():
            way()
        return taken

    monkeypatch.setattr(module, "is_on", lambda: True)
    monkeypatch.setattr(module, "calibration", lambda: SimpleNamespace(choose=choose))
    monkeypatch.setattr(module.row_attention, "_COLD", 2**14)
    model = network()
    row, rope = CompiledRow(model, {}), model.rope(torch.tensor([[37]]))
    made: list[str] = []
    function = row._function
    monkeypatch.setattr(row, "_function", lambda layer, way: made.append(way) or function(layer, way))
    for n in (37, 60):
        row.between(0, *row_inputs(n), rope)
    assert asked == ["compiled step, 2 x 3 heads of 16, 64 entries, float32"]
    made.clear()
    row.between(1, *row_inputs(37), rope)
    assert made == [taken]


def test_what_cannot_run_for_these_sizes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.row_attention, "_COLD", 2**14)
    row = CompiledRow(network(), {})
    monkeypatch.setattr(module.DirectCode, "fits", lambda *_: False)
    for way in row._timed(LAYERS - 1, row_inputs(), ("loops", "fused")).values():
        with pytest.raises(ValueError, match="other sizes"):
            way()
