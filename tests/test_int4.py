"""Draft weights of 4-bit codes: what they stand for, the products with them, and models that draft with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_peak_memory import Alive
from torch import Tensor

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.engine.compiled_row import CompiledRow
from fastkv.engine.footprint import Footprint
from fastkv.engine.speculation import asking
from fastkv.kernels import int4 as module
from fastkv.kernels.int4 import dequantised, int4_product, quantise_, scratch_bytes, shapes
from fastkv.kernels.tracing import GRAPH, recorded_as
from fastkv.models.config import ModelConfig
from fastkv.models.layers import Embedding
from fastkv.models.linear import Linear
from fastkv.models.llama import Llama
from fastkv.models.weights import bytes_apart, copy_bytes, in_integers

PROMPT = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
FEW = FastKV(min_tokens=8)
GREEDY = SamplingParams(max_tokens=14, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=14, ignore_eos=True, temperature=0.9, seed=3, top_p=0.9)
CPU = torch.device("cpu")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    words, pairs = (torch.empty(shape, dtype=dtype) for shape, dtype in shapes(*matrix.shape))
    quantise_(words, pairs, matrix)
    return words, pairs


# --- codes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_a_time", [2**18, 300])
def test_a_value_is_at_most_half_a_step_off(
    dtype: torch.dtype, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the rounding of the pair takes from the ends."""
    monkeypatch.setattr(module, "_ON_CPU", at_a_time)
    matrix = torch.cat((noise(20, 96), 1e-2 * noise(20, 96) + 0.3, torch.zeros(2, 96))).to(dtype)
    words, pairs = quantised(matrix)
    back = dequantised(words, pairs, torch.float32)
    low, scale = (each.repeat_interleave(32, dim=1) for each in pairs.float().unbind(1))
    bound = scale / 2 + 2**-11 * (low.abs() + 15 * scale) + 1e-7
    assert bool(((back - matrix.float()).abs() <= bound).all())
    groups = matrix.float().unflatten(1, (-1, 32))
    torch.testing.assert_close(pairs[:, 1].float(), (groups.amax(2) - groups.amin(2)) / 15, atol=3e-4, rtol=1e-3)
    assert not back[-2:].any()


def test_a_word_holds_eight_neighbours_of_a_group() -> None:
    """Every code at every place, those that make its word negative too."""
    codes = torch.stack([torch.arange(128).add(7 * row).remainder(16) for row in range(16)])
    words, pairs = quantised(codes.float())
    assert torch.equal(dequantised(words, pairs, torch.float32), codes.float())
    assert int(words.min()) < 0 < int(words.max())
    for group, word, place in ((0, 0, 0), (1, 2, 3), (3, 3, 7)):
        held = (words[:, word * 4 + group] >> 4 * place) & 15
        assert torch.equal(held, codes[:, 32 * group + 8 * word + place].int())


def test_what_came_from_groups_of_sixteen_levels_comes_back() -> None:
    first = dequantised(*quantised(noise(24, 64)), torch.float32)
    again = dequantised(*quantised(first), torch.float32)
    torch.testing.assert_close(again, first, atol=2e-3, rtol=0)


def test_bytes_are_five_bits_a_weight() -> None:
    words, pairs = quantised(noise(48, 64))
    assert words.nbytes + pairs.nbytes == 48 * 64 * 5 // 8


# --- products ---

X: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: noise(1, 64),
    "one token": lambda: noise(1, 1, 64),
    "many rows": lambda: noise(2, 50, 64),
    "no row": lambda: noise(1, 0, 64),
    "every second value": lambda: noise(4, 128)[:, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", X)
def test_the_product_is_that_with_the_floats(which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ON_CPU", 600)  # several pieces
    x, (words, pairs) = X[which]().to(dtype), quantised(noise(48, 64))
    expected = F.linear(x.float(), dequantised(words, pairs, torch.float32))
    found = int4_product(x, words, pairs)
    assert found.dtype == dtype
    exact = dtype is torch.float32
    torch.testing.assert_close(found.float(), expected, atol=1e-4 if exact else 0.3, rtol=1e-5 if exact else 0.02)


@pytest.mark.parametrize("shape", [(1, 96), (1, 4, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiler_is_given_are_the_same_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes = torch.arange(48 * 96).mul(7).remainder(16).view(48, 96)  # every code at every place of a word
    words, pairs = quantised(codes / 5 - 1)
    x = noise(*shape).to(dtype)
    with recorded_as(GRAPH):
        found = int4_product(x, words, pairs)
    expected = F.linear(x.float(), dequantised(words, pairs, torch.float32))
    assert (found.dtype, found.shape) == (dtype, (*shape[:-1], 48))
    exact = dtype is torch.float32
    torch.testing.assert_close(found.float(), expected, atol=1e-4 if exact else 0.05, rtol=1e-5 if exact else 0.02)


def test_a_compiled_product_is_alike() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no compiler here")
    layer = Linear(64, 48)
    words, layer.scale = quantised(noise(48, 64))
    layer.weight = torch.nn.Parameter(words, requires_grad=False)
    compiled, x = torch.compile(lambda x: torch.relu(layer(x)), dynamic=False), noise(1, 1, 64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), torch.relu(layer(x)), atol=1e-4, rtol=1e-4)
    assert torch.equal(layer.dense(), dequantised(words, layer.scale, torch.float32))


@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_pass_4_bit_weights(rows: int) -> None:
    layer = Linear(64, 48)
    words, layer.scale = quantised(noise(48, 64))
    layer.weight = torch.nn.Parameter(words, requires_grad=False)
    x = noise(rows, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dense().sum(dim=0).expand(rows, -1), atol=1e-4, rtol=1e-4)


def test_floats_that_a_product_makes_are_counted() -> None:
    words, pairs = quantised(noise(4096, 256))  # four times as many as are floats at a time
    x, alive = noise(1, 256).bfloat16(), Alive(torch.nn.Module())
    alive.before = {each.untyped_storage()._cdata for each in (words, pairs, x)}
    with torch.inference_mode(), alive:
        int4_product(x, words, pairs)
    assert scratch_bytes(CPU) < alive.peak < 1.05 * scratch_bytes(CPU)


# --- models ---


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", device="cpu", draft_weights="int4")


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_tokens_are_those_of_the_full_cache(llm: LLM, params: SamplingParams) -> None:
    found = llm.generate(PROMPT, params, FEW, speculation="self", draft_tokens=3)
    assert found.token_ids == llm.generate(PROMPT, params, FullKV()).token_ids
    told = found.metrics.speculation
    assert told.drafted_tokens > 0
    assert told.draft_weight_bytes == bytes_apart(llm._drafting.model, llm.model)
    assert told.draft_weight_bytes == copy_bytes(llm.config, "int4") < copy_bytes(llm.config, "int8")


def test_compiled_drafts_multiply_words(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, stand_in_compiler: list[Any]
) -> None:
    expected = llm.generate(PROMPT, GREEDY, FullKV()).token_ids
    drafting = llm._drafting.model
    monkeypatch.setattr(drafting, "row", CompiledRow(drafting, {}))
    assert llm.generate(PROMPT, GREEDY, FEW, speculation="self", draft_tokens=3).token_ids == expected
    nodes = stand_in_compiler[1].graph.graph.nodes
    dtypes = {str(node.meta["val"].dtype) for node in nodes if node.op == "placeholder"}
    assert {"torch.int32", "torch.float16"} <= dtypes
    assert all(each.runs for each in stand_in_compiler)


def test_matrices_have_codes_and_the_head_is_int8(llm: LLM) -> None:
    copy, plain = llm._drafting.model, llm.model
    for (name, mine), (_, its) in zip(copy.named_parameters(), plain.named_parameters(), strict=True):
        expected = torch.int8 if "lm_head" in name else torch.int32 if "proj" in name else torch.float32
        assert mine.dtype == expected, name
        assert (mine.data_ptr() == its.data_ptr()) is (expected == torch.float32), name
    for mine, its in zip(copy.modules(), plain.modules(), strict=True):
        if isinstance(mine, Linear) and isinstance(its, Linear) and mine is not copy.lm_head:
            words, pairs = quantised(its.weight)
            assert torch.equal(mine.weight, words)
            assert torch.equal(mine.scale, pairs)
    assert copy.rotary is plain.rotary


def held(model: Llama) -> dict[int, Tensor]:
    """What a model holds in integers, and scales."""
    owners = [each for each in model.modules() if isinstance(each, (Linear, Embedding)) and each.scale is not None]
    return {each.data_ptr(): each for owner in owners for each in (owner.weight, owner.scale)}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_tied_embedding_is_the_head(archive_folder: Path, kind: str) -> None:
    plain = LLM(archive_folder, dtype="float32", device="cpu").model
    copy = in_integers(plain, kind)
    assert copy.lm_head.weight is copy.embed_tokens.weight
    assert (copy.lm_head.weight.dtype, copy.lm_head.scale) == (torch.int8, copy.embed_tokens.scale)
    integers = sum(each.nbytes for each in held(copy).values())
    assert integers == copy_bytes(plain.config, kind) == bytes_apart(copy, plain)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(copy.embed(ids), plain.embed(ids), atol=0.02, rtol=0.02)


def test_drafts_of_4_bits_go_with_int8_weights(tiny_folder: Path) -> None:
    """These share the head; the rest is made of the integers."""
    llm = LLM(tiny_folder, dtype="float32", device="cpu", weights="int8", draft_weights="int4")
    copy, model = llm._drafting.model, llm.model
    assert copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    own = model.blocks[0].self_attn.o_proj
    assert torch.equal(copy.blocks[0].self_attn.o_proj.weight, quantised(own.dense())[0])
    assert bytes_apart(copy, model) == copy_bytes(llm.config, "int4", "int8") < copy_bytes(llm.config, "int4")
    found = llm.generate(PROMPT, GREEDY, FEW, speculation="self", draft_tokens=3)
    assert found.token_ids == llm.generate(PROMPT, GREEDY, FullKV()).token_ids
    assert found.metrics.speculation.draft_weight_bytes == bytes_apart(copy, model)


def test_the_floats_of_a_draft_step_are_counted(llm: LLM, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Footprint] = []
    monkeypatch.setattr(asking, "check_request_fits", lambda model, plan, needed, reusable: seen.append(needed))
    for each in (llm, tiny_llm):
        each.generate(PROMPT, GREEDY, FEW, speculation="self")
    assert seen[0].step - seen[1].step == scratch_bytes(CPU)


def test_loading_counts_the_copy(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says that steps which are not compiled are slow."""
    seen: list[dict[str, int]] = []
    monkeypatch.setattr("fastkv.engine.loaded.check_fits", lambda what, parts, *rest, **more: seen.append(dict(parts)))
    LLM(tiny_folder, dtype="float32", device="cpu", draft_weights="int4")
    assert seen[0]["weights of drafts"] == copy_bytes(ModelConfig.from_pretrained(tiny_folder), "int4")
    assert [record.getMessage() for record in caplog.records if "without compile" in record.getMessage()]


def test_rows_that_are_no_whole_groups_are_refused(stories_folder: Path) -> None:
    with pytest.raises(FastKVError, match="groups of 32 weights, and the model has rows of 172: take int8") as caught:
        LLM(stories_folder, device="cpu", draft_weights="int4")
    assert caught.value.setting == "draft_weights"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"draft_weights": "int2"}, "one of int8, int4"),
        ({"draft_weights": "int8", "weights": "int8"}, "already"),
        ({"draft_weights": "int4", "weights": "int4"}, "weights must be one of int8, not"),
    ],
)
def test_what_is_no_choice_is_refused(settings: dict[str, str], says: str, tiny_folder: Path) -> None:
    with pytest.raises(FastKVError, match=says):
        LLM(tiny_folder, device="cpu", **settings)  # type: ignore[arg-type]
