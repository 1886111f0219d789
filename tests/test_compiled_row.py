"""A row's step as few compiled functions: the same as the plain steps, compiled once for layers that are alike.

The compiler itself is left out but for test_compile.py: what it is given runs as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV, FullKV, SamplingParams
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape
from fastkv.cache.policies import FastKVAda, Quest
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.console.load import load_model
from fastkv.console.parser import guarded
from fastkv.engine import compile as compile_module
from fastkv.engine import compiled_row as module
from fastkv.engine import loaded as loaded_module
from fastkv.engine.compiled_row import CompiledRow
from fastkv.engine.decode import decode_step
from fastkv.kernels import direct, kept_code
from fastkv.kernels.direct import DirectCompiler
from fastkv.kernels.recording import recorded
from fastkv.kernels.size_conditions import Sizes
from fastkv.models.config import ModelConfig
from fastkv.models.layers import Rope, Rotation
from fastkv.models.llama import JUDGED, Llama
from fastkv.models.weights import random_weights

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Granite")
LAYERS = 4
PROMPT = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()

Compiler = list[Any]  # the graphs that it was given


@pytest.fixture(autouse=True)
def compiler(stand_in_compiler: Compiler, traced_once: None) -> Compiler:
    return stand_in_compiler


def network(family: str = "Llama", **changes: Any) -> Llama:
    settings = {"n_layers": LAYERS, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16, "context_length": 2048}
    config = ModelConfig(f"{family}ForCausalLM", 60, 24, 40, **{**settings, **changes})
    model = random_weights(config, torch.float32, torch.device("cpu"))
    model.reserve(1000)
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entries_of(n: int = 37, room: int = 5, seed: int = 2, heads: int = 2) -> tuple[Tensor, Tensor]:
    """k and v of n entries, in memories of their own with room for more."""
    k, v = (noise(1, heads, n + room, 16, seed=seed + place)[:, :, :n] for place in (0, 1))
    return k, v


def inputs_of(model: Llama, layer: int, n: int = 37) -> tuple[Tensor, ...]:
    """What the function of a layer between two others is given."""
    rotation = model.rope(torch.tensor([[n]])).rotations[0]
    new = (each[:, :, -1:] for each in entries_of(n, seed=5))
    return noise(1, 1, 24), noise(1, 6, 1, 16, seed=1), *entries_of(n), *new, rotation.cos, rotation.sin


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def compiled_llm(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(tiny_llm.model, "row", CompiledRow(tiny_llm.model, {}))
    return tiny_llm


# --- the same as the plain steps ---


def plain(model: Llama, hidden: Tensor, rope: Rope, entries: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmax attention as its definition has it, and the steps of the blocks."""
    count = hidden.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        entries[layer][0][:, :, -count:], entries[layer][1][:, :, -count:] = k, v
        keys, values = (each.repeat_interleave(6 // k.shape[1], dim=1) for each in entries[layer])
        later = torch.ones(count, keys.shape[2]).triu(keys.shape[2] - count + 1).bool()
        return ((q @ keys.transpose(2, 3)) / 4).masked_fill(later, -torch.inf).softmax(-1) @ values

    for layer, block in enumerate(model.blocks):
        hidden = block.mlp(block.attention(hidden, rope, partial(attend, layer=layer)))
    return model.head(hidden)


# 1,500 entries: by torch's own attention. Several tokens: of the shapes that differ for them.
@pytest.mark.parametrize(
    ("family", "heads", "n", "count"),
    [
        *((family, 2, 37, 1) for family in FAMILIES),
        *(("Llama", heads, n, 1) for heads, n in ((2, 4), (2, 1500), (1, 37), (6, 37))),
        *((family, heads, n, JUDGED) for family, heads, n in (("Llama", 2, 37), ("Qwen3", 6, 37), ("Llama", 1, 1500))),
    ],
)
def test_every_family_computes_what_it_does_in_plain_steps(
    family: str, heads: int, n: int, count: int, compiler: Compiler
) -> None:
    model = network(family, n_kv_heads=heads)
    hidden, rope = noise(1, count, 24), model.rope(torch.arange(n, n + count)[None])
    # Each layer has its own capacity.
    expected, found = ([entries_of(n, 5 + layer, layer, heads) for layer in range(LAYERS)] for _ in range(2))
    logits = CompiledRow(model, {}).logits(hidden, rope, found)
    assert torch.equal(hidden, noise(1, count, 24))
    torch.testing.assert_close(logits, plain(model, hidden, rope, expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # written as they should be, and nothing else
    assert [each.runs for each in compiler] == [1, LAYERS - 1, 1]


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8)])
def test_decoding_gives_the_tokens_of_plain_steps(
    policy: Policy, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = tiny_llm.generate(PROMPT, params, policy).token_ids
    monkeypatch.setattr(tiny_llm.model, "row", CompiledRow(tiny_llm.model, {}))
    assert tiny_llm.generate(PROMPT, params, policy).token_ids == expected
    assert [each.runs for each in compiler] == [11, 11 * (tiny_llm.config.n_layers - 1), 11]


@pytest.mark.parametrize("attention", ["heads of different lengths", "few reads", "a budget"])
def test_attention_of_another_kind_lies_between_compiled_parts(
    attention: str, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    policy = {"heads of different lengths": FastKVAda(min_tokens=8), "few reads": Quest(read_len=32)}.get(attention)
    settings: Any = {"policy": policy or FullKV(), "decode_budget": None if policy else 60}
    expected = tiny_llm.generate(PROMPT, params, **settings).token_ids
    monkeypatch.setattr(tiny_llm.model, "row", CompiledRow(tiny_llm.model, {}))
    monkeypatch.setattr(tiny_llm.model, "between", lambda *_: pytest.fail("not compiled ahead, and not kept"))
    assert tiny_llm.generate(PROMPT, params, **settings).token_ids == expected
    assert [each.runs for each in compiler] == [5, 5 * (tiny_llm.config.n_layers - 1), 5]


@pytest.mark.parametrize("draft_tokens", [None, 2, 3, 8])
def test_drafted_tokens_are_judged_by_compiled_code(
    draft_tokens: int | None, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    """Fewer than it judges have others after them, which are forgotten; the last ones have no room for that."""
    params = SamplingParams(max_tokens=17, ignore_eos=True)
    expected = tiny_llm.generate(PROMPT, params, FullKV()).token_ids
    row = CompiledRow(tiny_llm.model, {})
    judged: list[int] = []
    logits = row.logits
    monkeypatch.setattr(row, "logits", lambda hidden, *rest: judged.append(hidden.shape[1]) or logits(hidden, *rest))
    monkeypatch.setattr(tiny_llm.model, "row", row)
    found = tiny_llm.generate(PROMPT, params, FastKV(min_tokens=8), speculation="self", draft_tokens=draft_tokens)
    assert found.token_ids == expected
    assert set(judged) == {1, JUDGED}
    assert all(each.runs for each in compiler)


def test_what_no_compiled_step_can_judge_is_not_prepared_for(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    row, prepared = CompiledRow(tiny_llm.model, {}), []
    monkeypatch.setattr(row, "prepare", prepared.append)
    monkeypatch.setattr(tiny_llm.model, "row", row)
    for policy, n in ((FastKVAda(min_tokens=8), 12), (FullKV(), 2)):
        tiny_llm.generate(PROMPT, SamplingParams(max_tokens=n, ignore_eos=True), policy, speculation="ngram")
    assert prepared == []


def test_only_a_single_row_goes_this_way(compiled_llm: LLM, compiler: Compiler) -> None:
    batch = compiled_llm.prefill(torch.tensor([PROMPT, PROMPT]), FullKV())
    compiled_llm.decode(batch.cache, torch.tensor([5, 6]))
    one = compiled_llm.prefill(PROMPT, FullKV())
    compiled_llm.decode(one.cache, torch.tensor([[5, 6]]))
    assert not compiler
    compiled_llm.decode(one.cache, torch.tensor([7]))
    assert len(compiler) == 3


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
    return recorded(CompiledRow(model, {})._function(layer, "loops"), inputs_of(model, layer))


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


@pytest.mark.parametrize("different", ["dtype", "strides"])
def test_dtypes_and_strides_tell_code_apart(different: str) -> None:
    one, other = (recorded_sum(torch.ones(2, 3)) for _ in range(2))
    assert one == other
    weight = torch.ones(2, 3, dtype=torch.bfloat16) if different == "dtype" else torch.ones(3, 2).t()
    assert recorded_sum(weight) != one


def recorded_sum(weight: Tensor) -> tuple[str, str]:
    """With it as a weight, and as an input."""
    as_weight = recorded(lambda x: (x + weight,), [torch.ones(2, 3)])[0]
    return as_weight, recorded(lambda x: (x + 1,), [weight])[0]


def test_nothing_is_compiled_twice(compiled_llm: LLM, compiler: Compiler) -> None:
    """Neither for a longer sequence or another policy, nor for another layer; for more threads it is."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for prompt, policy in ((PROMPT, FullKV()), (PROMPT[:50], FullKV()), (PROMPT, FastKV(min_tokens=8))):
        compiled_llm.generate(prompt, params, policy)
    assert len(compiler) == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        compiled_llm.generate(PROMPT, params, FullKV())
    finally:
        torch.set_num_threads(threads)
    assert len(compiler) == 6


# --- what does not fit ---


def unfit(k: Tensor, v: Tensor, change: str) -> tuple[Tensor, Tensor]:
    if change == "values have another number of entries":
        return k, v[:, :, 1:]
    if change == "other strides":
        return k.transpose(2, 3).contiguous().transpose(2, 3), v
    return torch.cat((k, k), dim=1), torch.cat((v, v), dim=1)  # more heads


@pytest.mark.parametrize("change", ["values have another number of entries", "other strides", "more heads"])
def test_other_sizes_do_not_fit(change: str) -> None:
    model = network()
    code, _ = CompiledRow(model, {})._compiled(1, "loops", inputs_of(model, 1))
    hidden, q, k, v, *others = inputs_of(model, 1, n=50)
    assert code.fits((hidden, q, k, v, *others))
    assert not code.fits((hidden, q, *unfit(k, v, change), *others))


def test_where_sizes_do_not_fit_it_runs_as_it_is(compiler: Compiler) -> None:
    model = network()
    hidden, rope = noise(1, 1, 24), model.rope(torch.tensor([[37]]))
    odd = [unfit(*entries_of(seed=layer), "other strides") for layer in range(LAYERS)]
    expected = plain(model, hidden, rope, [entries_of(seed=layer) for layer in range(LAYERS)])
    torch.testing.assert_close(CompiledRow(model, {}).logits(hidden, rope, odd), expected, atol=1e-4, rtol=1e-4)
    assert [each.runs for each in compiler] == [0, 0, 0]


def test_a_query_with_gaps_is_closed(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code takes its inputs for what they were when it was compiled, and does not look."""
    model = network()
    row, rotation = CompiledRow(model, {}), model.rope(torch.tensor([[37]])).rotations[0]
    rope = Rope((Rotation(*(torch.stack((each, each), -1)[..., 0] for each in (rotation.cos, rotation.sin))),))
    given: list[tuple[Tensor, ...]] = []

    def run(layer: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(inputs)
        return (noise(1, 1, 24), noise(1, 6, 1, 32)[..., ::2])[layer == -1 :]

    monkeypatch.setattr(row, "_run", run)
    row.logits(noise(1, 1, 24), rope, [entries_of()] * LAYERS)
    assert [inputs[1].stride() for inputs in given[1:]] == [(96, 16, 16, 1)] * LAYERS
    assert all(table.is_contiguous() for inputs in given[:LAYERS] for table in inputs[-2:])


def test_a_compiler_that_fails_is_told_once(
    compiled_llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row, compiled_llm.model.row = compiled_llm.model.row, None
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    expected = compiled_llm.generate(PROMPT, params, FullKV()).token_ids

    def broken(*_: Any, **named: Any) -> None:
        raise RuntimeError("\nno such pass\nand a page more")

    monkeypatch.setattr(direct, "_built", broken)
    compiled_llm.model.row = row
    assert compiled_llm.generate(PROMPT, params, FullKV()).token_ids == expected
    (told,) = (record.getMessage() for record in caplog.records if record.name.startswith("fastkv"))
    assert told.endswith("slower for it: no such pass")


def test_what_was_compiled_goes_on_where_something_else_cannot_be(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Long sequences need other code; it is tried once for all layers, and told once."""
    model = network()
    row, hidden = CompiledRow(model, {}), noise(1, 1, 24)
    tried: list[int] = []

    def broken(*arguments: Any) -> Path:
        tried.append(1)
        raise RuntimeError("no more")

    def logits(n: int) -> Tensor:
        return row.logits(hidden, model.rope(torch.tensor([[n]])), [entries_of(n, seed=at) for at in range(LAYERS)])

    short = logits(37)
    monkeypatch.setattr(direct, "_built", broken)
    expected = plain(
        model, hidden, model.rope(torch.tensor([[1500]])), [entries_of(1500, seed=at) for at in range(LAYERS)]
    )
    torch.testing.assert_close(logits(1500), expected, atol=1e-4, rtol=1e-4)
    runs = [each.runs for each in compiler]
    assert torch.equal(logits(37), short)
    assert [each.runs for each in compiler] == [runs[0] + 1, runs[1] + LAYERS - 1, runs[2] + 1]
    assert len(tried) == 1
    assert caplog.text.count("slower for it: no more") == 1


@pytest.mark.parametrize(("n", "way"), [(1020, "loops"), (1024, "fused"), (1040, "fused")])
def test_without_measuring_the_way_does_not_depend_on_what_came_before(n: int, way: str) -> None:
    model = network()
    row = CompiledRow(model, {})
    for before in (n - 3, n):
        assert row._way(0, inputs_of(model, 0, before)) == ("loops" if before < 1024 else "fused")
    assert row._way(0, inputs_of(model, 0, n)) == way


def test_options_of_another_version_of_torch_are_left_out() -> None:
    assert direct.known_options({**compile_module.ONE_ROW, "of_another_version": 1}) == compile_module.ONE_ROW


def test_a_weight_that_the_graph_lacks_is_an_error(compiler: Compiler) -> None:
    """A constant that is made anew at each call is no weight."""
    with pytest.raises(ValueError, match="unpack"):
        DirectCompiler({}).compiled(lambda x: (x + torch.tensor([1.0, 2.0]),), [noise(3, 2)])


# --- kept on disk ---


def compiled_once_more(n: int = 37) -> Tensor:
    """Logits by a process of its own, as far as one can be had here."""
    model = network()
    entries = [entries_of(n, seed=layer) for layer in range(LAYERS)]
    return CompiledRow(model, {}).logits(noise(1, 1, 24), model.rope(torch.tensor([[n]])), entries)


def files_of(cache_folder: Path, ending: str) -> list[Path]:
    return sorted((cache_folder / "compiled").glob(f"*.{ending}"))


def test_another_process_compiles_nothing(compiler: Compiler, cache_folder: Path) -> None:
    assert not kept_code.anything_kept()
    expected = compiled_once_more()
    assert len(compiler) == len(files_of(cache_folder, "so")) == len(files_of(cache_folder, "json")) == 3
    assert kept_code.anything_kept()
    assert torch.equal(compiled_once_more(), expected)
    compiled_once_more(50)
    assert len(compiler) == 3
    assert [each.runs for each in compiler] == [3, 3 * (LAYERS - 1), 3]


# "00": a library that is there, but another one.
@pytest.mark.parametrize(
    ("ending", "content"),
    [("so", ""), ("so", "00"), *(("json", each) for each in ("", "[]", '{"format": 99}', '{"format": 1}'))],
)
def test_what_is_not_as_it_was_written_is_compiled_again(
    ending: str, content: str, compiler: Compiler, cache_folder: Path
) -> None:
    expected = compiled_once_more()
    before = {path: path.read_bytes() for path in files_of(cache_folder, ending)}
    for path in before:
        path.write_text(content)
    assert torch.equal(compiled_once_more(), expected)
    assert len(compiler) == 6
    assert all(path.read_bytes() != content.encode() for path in before)
    compiled_once_more()
    assert len(compiler) == 6


@pytest.mark.parametrize("change", [{"condition": None}, {"open": {}}, {"open": {"99": [1]}}])
def test_sizes_that_were_changed_are_not_believed(
    change: dict[str, Any], compiler: Compiler, cache_folder: Path
) -> None:
    """They stand in for the checks of the library."""
    compiled_once_more()
    for path in files_of(cache_folder, "json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"sizes": about["sizes"] | change}))
    compiled_once_more()
    assert len(compiler) > 3


def test_a_condition_that_is_not_understood_is_found_anew(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_once_more()
    library = files_of(kept_code.cache_folder(), "so")[0]
    monkeypatch.setattr(direct, "kept", lambda kind: (library, Sizes({}, "L['t0'].data_ptr()[0] == 0")))
    compiled_once_more()
    assert len(compiler) == 6


@pytest.mark.usefixtures("traced_anew")
def test_conditions_that_the_compiler_adds_are_kept(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides by sizes how loops are written."""
    built = direct._built

    def deciding(graph: Any, examples: Sequence[Tensor], options: dict[str, Any]) -> Path:
        library = built(graph, examples, options)
        assert bool(examples[2].shape[2] <= 600)
        return library

    monkeypatch.setattr(direct, "_built", deciding)
    model = network()
    code, _ = CompiledRow(model, {})._compiled(1, "loops", inputs_of(model, 1))
    assert [code.fits(inputs_of(model, 1, n)) for n in (37, 600, 601)] == [True, True, False]


def test_a_library_is_there_before_it_is_told_of(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(kept_code, "write_atomically", lambda path, content, **_: written.append(path.suffix))
    compiled_once_more()
    assert written == [".so", ".json"] * 3


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_write_to_is_not_used(
    mode: int, compiler: Compiler, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_once_more()
    assert (cache_folder / "compiled").stat().st_mode & 0o777 == 0o700
    (cache_folder / "compiled").chmod(mode)
    compiled_once_more()
    assert len(compiler) == 6
    assert "others can write to it" in caplog.text


@pytest.mark.parametrize("different", ["torch", "options", "cpu_name", "cpu_flags", "capability"])
def test_code_for_something_else_is_not_taken(
    different: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_once_more()
    direct._machine_of.cache_clear()
    if different == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif different == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    elif different.startswith("cpu"):
        monkeypatch.setattr(direct, different, lambda: "another")
    else:
        monkeypatch.setattr(module, "DirectCompiler", lambda _: DirectCompiler({"size_asserts": False}))
    compiled_once_more()
    direct._machine_of.cache_clear()
    assert len(compiler) == 6


def test_a_folder_that_cannot_be_written_to_is_no_error(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = compiled_once_more()
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file" / "cache"), "~nobody-of-this-name/cache"):
        monkeypatch.setenv("FASTKV_CACHE", folder)
        assert torch.equal(compiled_once_more(), expected)
        assert not kept_code.anything_kept()


def test_where_code_is_kept_no_compiler_is_looked_for(
    compiler: Compiler, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[torch.device] = []
    monkeypatch.setattr(compile_module, "_check_compiler", looked.append)
    for _ in range(2):
        LLM(tiny_folder, dtype="float32", device="cpu", compile=True)
    assert len(looked) == 1


@pytest.mark.parametrize("step_threads", [None, 2])
def test_a_model_is_compiled_while_it_is_loaded(
    step_threads: int | None,
    compiler: Compiler,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With as many threads as its steps will have; the first answer waits for nothing, and the command says so."""
    monkeypatch.setattr(compile_module, "_check_compiler", lambda _: None)
    monkeypatch.setattr(loaded_module, "step_threads", lambda _: step_threads)
    llm = loaded(tiny_folder)
    assert capsys.readouterr().err.splitlines() == parts_told(1, 2, 3)
    llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), FullKV())
    assert len(compiler) == 3
    loaded(tiny_folder)
    assert capsys.readouterr().err == ""


def loaded(folder: Path) -> LLM:
    """As a command loads it."""
    found: list[LLM] = []
    guarded("test", lambda: found.append(load_model(folder, dtype="float32", device="cpu", compile=True)))
    return found[0]


def parts_told(*numbers: int) -> list[str]:
    return [f"compiling for this machine, once (part {number})" for number in numbers]


@pytest.mark.parametrize("later", ["drafts that are judged", "a longer cache"])
def test_a_command_says_what_is_compiled_later(
    later: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pause of ten seconds and more is told, whenever it is: not only while the model is loaded."""
    monkeypatch.setattr(compile_module, "_check_compiler", lambda _: None)
    llm = loaded(tiny_folder)
    capsys.readouterr()
    if later == "a longer cache":
        monkeypatch.setattr(module, "_SHORT", 6)
    how = {"speculation": "ngram"} if later == "drafts that are judged" else {}
    params = SamplingParams(max_tokens=JUDGED + 1, ignore_eos=True)
    guarded("test", lambda: llm.generate(PROMPT, params, FullKV(), **how) and None)
    expected = parts_told(4, 5, 6) if how else parts_told(4, 5)  # before the first attention nothing depends on length
    assert capsys.readouterr().err.splitlines() == expected
    llm.generate(PROMPT, params, FullKV(), **how)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["ngram", "self"])
def test_no_step_that_judges_is_compiled_anew_at_the_end_of_an_answer(
    kind: str, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has no room for as many tokens there; fewer would wait for the compiler once more."""
    vocabulary, counts = tiny_llm.config.vocab_size, set()

    def logits(hidden: Tensor, *_: Any) -> Tensor:
        counts.add(hidden.shape[1])
        return torch.zeros(1, hidden.shape[1], vocabulary)

    monkeypatch.setattr(tiny_llm.model, "row", SimpleNamespace(prepare=lambda *_: None, logits=logits))
    monkeypatch.setattr(tiny_llm.model, "between", lambda *_: pytest.fail("a step that nothing was prepared for"))
    policy = FullKV() if kind == "ngram" else FastKV(kv_len=64)
    for count in range(JUDGED + 1, JUDGED + 5):
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        for drafted in (1, 2, 3, None):
            out = tiny_llm.generate(PROMPT, params, policy, speculation=kind, draft_tokens=drafted)
            assert len(out.token_ids) == count
    assert counts == {1, JUDGED}


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
    row = CompiledRow(model, {})
    made: list[str] = []
    function = row._function
    monkeypatch.setattr(row, "_function", lambda layer, way: made.append(way) or function(layer, way))
    for n in (37, 60):
        row._run(0, inputs_of(model, 0, n))
    assert asked == ["compiled step, 2 x 3 heads of 16, 64 entries, float32"]
    made.clear()
    row._run(1, inputs_of(model, 1))
    assert made == [taken]


def test_what_cannot_run_for_these_sizes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.row_attention, "_COLD", 2**14)
    model = network()
    row = CompiledRow(model, {})
    monkeypatch.setattr(module.DirectCode, "fits", lambda *_: False)
    for way in row._timed(1, inputs_of(model, 1), ("loops", "fused")).values():
        with pytest.raises(ValueError, match="other sizes"):
            way()
