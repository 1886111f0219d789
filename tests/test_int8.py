"""Weights of 8-bit integers: what they stand for, every way to multiply with them, and models that have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv import LLM, AdaKV, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.engine.compile import _check_compiler
from fastkv.kernels import int8 as module
from fastkv.kernels import products
from fastkv.kernels.int8 import dequantised, int8_product, quantise_, ways_of
from fastkv.models.layers import Embedding
from fastkv.models.linear import Linear
from fastkv.models.weights import checkpoint_tensors, model_bytes

PROMPT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice made, and matrices of any size worth one."""
    monkeypatch.setattr(module, "SMALLEST", 0)
    module.forget()
    yield
    module.forget()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = torch.empty(matrix.shape, dtype=torch.int8), torch.empty(len(matrix))
    quantise_(values, scale, matrix)
    return values, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_a_time", [2**22, 50])
def test_a_value_is_at_most_half_a_step_off(
    dtype: torch.dtype, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)
    matrix = torch.cat((noise(20, 30), 1e-3 * noise(20, 30), torch.zeros(2, 30))).to(dtype)
    matrix[3] = 0
    values, scale = quantised(matrix)
    back = dequantised(values, scale, torch.float32)
    assert bool(((back - matrix.float()).abs() <= 0.501 * scale.unsqueeze(1)).all())
    largest = matrix.float().abs().amax(dim=1)
    torch.testing.assert_close(scale[largest > 0], (largest / 127)[largest > 0])
    assert torch.equal(values.abs().amax(dim=1).bool(), largest > 0)
    assert int(values.min()) == -127 or int(values.max()) == 127
    assert not back[3].any()


X: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: noise(1, 64),
    "one token": lambda: noise(1, 1, 64),
    "several sequences": lambda: noise(8, 1, 64),
    "many rows": lambda: noise(2, 50, 64),
    "no row": lambda: noise(1, 0, 64),
    "every second value": lambda: noise(4, 128)[:, ::2],
    "a row of zeros": lambda: torch.zeros(2, 64),
    "one large value": lambda: torch.cat((noise(1, 63), torch.full((1, 1), 500.0)), dim=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["dequantise", "packed", "pair"])
@pytest.mark.parametrize("which", X)
def test_every_way_is_the_product_with_the_floats(
    which: str, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_A_TIME", 600)  # several pieces
    ways = ways_of(dtype, "cpu")
    x, (values, scale) = X[which]().to(dtype), quantised(noise(48, 64))
    if way not in ways or not x.numel():
        way = "dequantise"
    with torch.inference_mode():
        expected = F.linear(x.float(), dequantised(values, scale, torch.float32))
        found = ways[way](x, values, scale)
    assert found.dtype == dtype
    exact = dtype is torch.float32 and way != "packed"
    error = (found.float() - expected).abs().max() if found.numel() else torch.zeros(())
    assert float(error) <= (3e-4 if exact else 0.02) * float(expected.abs().max() if found.numel() else 0)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    if "pair" not in ways_of(torch.float32, "cpu"):
        pytest.skip("no product of integers here")
    values, scale = quantised(noise(48, 64))
    x = torch.cat((noise(3, 64), 1000 * noise(1, 64)))
    with torch.inference_mode():
        together = ways_of(torch.float32, "cpu")["pair"](x, values, scale)
        alone = torch.cat([ways_of(torch.float32, "cpu")["pair"](row[None], values, scale) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("way", ["packed", "pair"])
@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_way_that_fails_is_out(way: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"packed": "_weight_int8pack_mm", "pair": "_int_mm"}[way]
    if fault == "missing":
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch, name, lambda x, *rest: torch.ones(len(x), 48))
    ways_of.cache_clear()
    assert way not in ways_of(torch.float32, "cpu")
    ways_of.cache_clear()


def test_rows_are_multiplied_as_measured(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    """Few rows by the fastest way for them; many rows as floats."""
    monkeypatch.setenv("FASTKV_CALIBRATION", "on")
    monkeypatch.setattr(products, "COLD", 2**12)
    seen: list[int] = []

    def other(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return module.dequantised_product(x, values, scale)

    def slow(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        raise RuntimeError("of another version")

    monkeypatch.setattr(module, "ways_of", lambda dtype, device: {"dequantise": slow, "other": other})
    values, scale = quantised(noise(48, 64))
    with torch.inference_mode():
        for rows in (1, 20):
            int8_product(noise(rows, 64), values, scale)
        seen.clear()
        for rows in (1, 20, 33):
            int8_product(noise(rows, 64), values, scale)
    assert seen == [1, 20]
    assert len(list((cache_folder / "calibration").iterdir())) == 1


@pytest.mark.parametrize("n_in", [8, 64, 63])
def test_what_a_compiler_is_given_are_the_same_sums(n_in: int) -> None:
    """Of every integer at every place of a word, and of rows that are no whole number of words."""
    values = torch.arange(48 * n_in).sub(128).to(torch.int8).view(48, n_in)
    assert (values.min(), values.max()) == (-128, 127)
    x, scale = noise(1, 1, n_in), torch.linspace(0.5, 2, 48)
    found = module._compiled(x, values, scale)
    torch.testing.assert_close(found, F.linear(x, dequantised(values, scale, torch.float32)), atol=1e-3, rtol=1e-5)


def test_compiled_products_are_alike() -> None:
    try:
        _check_compiler(torch.device("cpu"))
    except FastKVError as error:
        pytest.skip(str(error))
    layer = Linear(64, 48)
    layer.weight = torch.nn.Parameter(quantised(noise(48, 64))[0], requires_grad=False)
    layer.scale = quantised(noise(48, 64))[1]
    one, many = (torch.compile(lambda x: torch.relu(layer(x)), dynamic=dynamic) for dynamic in (False, True))
    with torch.inference_mode():
        for compiled, x in ((one, noise(1, 1, 64)), (many, noise(2, 3, 64))):
            torch.testing.assert_close(compiled(x), torch.relu(layer(x)), atol=0.2, rtol=0.02)


@pytest.fixture(scope="module")
def int8_llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", device="cpu", weights="int8")


def test_a_model_is_that_of_the_rounded_weights(int8_llm: LLM, tiny_folder: Path) -> None:
    """Prefill and steps, under a policy that scores, equal a float model whose matrices are the rounded ones."""
    plain = LLM(tiny_folder, dtype="float32", device="cpu")
    for module_ in plain.model.modules():
        if isinstance(module_, Linear) and module_ is not plain.model.lm_head:
            values, scale = quantised(module_.weight)
            module_.weight.copy_(dequantised(values, scale, torch.float32))
    head = dequantised(*quantised(plain.model.lm_head.weight), torch.float32)
    plain.model.lm_head.weight.copy_(head)
    policy = FastKV(min_tokens=8)
    expected, found = plain.prefill(PROMPT, policy), int8_llm.prefill(PROMPT, policy)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-3, rtol=2e-3)
    token = torch.tensor([7])
    steps = [llm.decode(each.cache, token) for llm, each in ((plain, expected), (int8_llm, found))]
    torch.testing.assert_close(steps[1], steps[0], atol=2e-3, rtol=2e-3)


def test_matrices_are_int8_and_the_rest_is_not(int8_llm: LLM, tiny_folder: Path) -> None:
    plain = LLM(tiny_folder, dtype="float32", device="cpu")
    model = int8_llm.model
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "proj" in name or "lm_head" in name} == {torch.int8}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {torch.float32}
    assert (int8_llm.dtype, model.precision) == (torch.float32, "float32, int8 weights")
    matrices = [each for each in model.modules() if isinstance(each, (Linear, Embedding)) and each.scale is not None]
    scales = sum(4 * len(each.weight) for each in matrices)
    held = sum(parameter.nbytes for parameter in model.parameters())
    if model.config.tie_word_embeddings:
        scales -= 4 * model.config.vocab_size  # one for both
    assert held + scales == model_bytes(int8_llm.config, torch.float32, "int8")
    assert held < 0.5 * sum(parameter.nbytes for parameter in plain.model.parameters())


@pytest.mark.parametrize("policy", [FullKV(), FastKV(min_tokens=8), AdaKV()])
def test_int8_weights_go_with_every_policy_and_batch(policy: FastKV, int8_llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:120], PROMPT[50:]]
    together = int8_llm.generate(prompts, params, policy)
    assert [len(output.token_ids) for output in together] == [6, 6, 6]
    assert together[0].run.dtype == "float32, int8 weights"


def test_a_tied_embedding_is_one_table(archive_folder: Path) -> None:
    llm = LLM(archive_folder, dtype="float32", device="cpu", weights="int8")
    plain = LLM(archive_folder, dtype="float32", device="cpu")
    if not llm.config.tie_word_embeddings:
        pytest.skip("its head is not tied")
    assert llm.model.lm_head.weight is llm.model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(llm.model.embed(ids), plain.model.embed(ids), atol=0.02, rtol=0.02)
    out = torch.empty(1, 3, llm.config.hidden_size)
    assert torch.equal(llm.model.embed(ids, out=out), llm.model.embed(ids))


def test_random_weights_can_be_int8(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, dtype="bfloat16", device="cpu", load_format="dummy", weights="int8")
    assert llm.model.precision == "bfloat16, int8 weights"
    assert llm.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)).token_ids


@pytest.mark.parametrize("weights", ["int4", "", "INT8"])
def test_other_weights_are_refused(weights: str, tiny_folder: Path) -> None:
    with pytest.raises(FastKVError, match="weights must be one of int8, not") as caught:
        LLM(tiny_folder, device="cpu", weights=weights)
    assert caught.value.setting == "weights"


def test_what_int8_costs_is_told(
    archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], benchmarks: Any
) -> None:
    """A table: nothing for the float weights themselves, little for int8, more for int4."""
    text = tmp_path / "text.txt"
    text.write_text((archive_folder.parent / "prompt.txt").read_text()[:1500])
    argv = ["--model", str(archive_folder), "--text", str(text), "--context", "200", "--steps", "20"]
    assert benchmarks.weights_quality.main(argv) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["float32", "int8", "int4"]
    assert rows[0][2:4] == ["+0.00 %", "0.00000"]
    assert float(rows[0][5]) == 0
    assert 0 < float(rows[1][3]) < float(rows[2][3])
    assert benchmarks.weights_quality.main([*argv[:4], "--context", "9000"]) == 2


@pytest.mark.parametrize("way", ["dequantise", "packed", "pair"])
def test_integers_alone_do_not_overflow_float16(way: str) -> None:
    """Their sum may be beyond its range where the product is not."""
    ways = ways_of(torch.float16, "cpu")
    values, scale = quantised(noise(48, 1024) / 32)
    x = (60 * noise(4, 1024)).half()
    with torch.inference_mode():
        found = ways.get(way, ways["dequantise"])(x, values, scale)
        expected = F.linear(x.float(), dequantised(values, scale, torch.float32))
    assert bool(found.isfinite().all())
    assert float((found.float() - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_what_is_not_a_number_stays_so() -> None:
    """It is then seen in the logits. A row of almost nothing is a row of zeros."""
    matrix = noise(4, 64)
    matrix[1, 5], matrix[2, 7], matrix[3] = torch.nan, torch.inf, 1e-44
    values, scale = quantised(matrix)
    found = F.linear(torch.ones(1, 64), dequantised(values, scale, torch.float32))[0]
    assert found.isfinite().tolist() == [True, False, False, True]
    assert found[3] == 0


@pytest.mark.parametrize("rows", [1, 8, 200])
def test_gradients_pass_int8_weights(rows: int) -> None:
    layer = Linear(64, 48)
    values, layer.scale = quantised(noise(48, 64))
    layer.weight = torch.nn.Parameter(values, requires_grad=False)
    x = noise(rows, 64).requires_grad_()
    layer(x).sum().backward()
    expected = dequantised(values, layer.scale, torch.float32).sum(dim=0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.expand(rows, -1), atol=1e-4, rtol=1e-4)


def test_int8_weights_are_no_checkpoint(int8_llm: LLM) -> None:
    with pytest.raises(FastKVError, match="int8 weights cannot be written"):
        checkpoint_tensors(int8_llm.model)
