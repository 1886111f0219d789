"""Products by oneDNN are those of F.linear, wherever they are made; and where they cannot be, F.linear makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkv import LLM, FastKV, FastKVError
from fastkv.engine.compile import _check_compiler
from fastkv.models import linear as module
from fastkv.models.linear import Linear, linear, onednn_product


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x of every product that oneDNN makes, of however small a matrix."""
    product = onednn_product()
    if product is None:
        pytest.skip("no product by oneDNN here")
    seen: list[tuple[int, ...]] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(module, "SMALLEST", 0)
    monkeypatch.setattr(module, "onednn_product", lambda: recorded)
    return seen


@pytest.fixture
def untried() -> Iterator[None]:
    """As if oneDNN had never been asked."""
    onednn_product.cache_clear()
    yield
    onednn_product.cache_clear()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: noise(1, 40),
    "one token": lambda: noise(1, 1, 40),
    "several sequences": lambda: noise(8, 1, 40),
    "a chunk": lambda: noise(1, 2048, 40),
    "a chunk of several sequences": lambda: noise(2, 700, 40)[:, 100:612],
    "last tokens": lambda: noise(3, 9, 40)[:, -1],
    "every second value": lambda: noise(4, 80)[:, ::2],
    "turned heads": lambda: noise(1, 4, 5, 10).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("which", X)
def test_products_are_those_of_f_linear(which: str, shapes: list[tuple[int, ...]]) -> None:
    """Whole matrices and rows of one, with biases and without, of x in any layout."""
    x, weight, bias = X[which](), noise(60, 40), noise(60)
    pairs = [
        (weight, None),
        (weight, bias),
        (weight[20:50], bias[20:50]),
        (weight, noise(120)[::2]),
        (weight[::3], None),
    ]
    with torch.inference_mode():
        for weight, bias in pairs:
            torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    assert shapes == [tuple(x.shape)] * len(pairs)


def test_only_what_can_gain_goes_to_onednn(shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a kernel of every shape for good, so it sees few numbers of rows; and it knows no gradients."""
    layer = Linear(16, 24)
    with torch.inference_mode():
        for rows in (1, 32, 33, 500, 1024, 1500, 4096):
            layer(noise(rows, 16))
        assert [rows for rows, _ in shapes] == [1, 32, 1024, 4096]
        Linear(16, 24, dtype=torch.bfloat16)(noise(1, 16).bfloat16())
        monkeypatch.setattr(module, "SMALLEST", 16 * 24 + 1)
        layer(noise(1, 16))
    assert len(shapes) == 4


def test_it_learns_as_any_layer_does(shapes: list[tuple[int, ...]]) -> None:
    ours, theirs = Linear(16, 24), nn.Linear(16, 24)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        layer(noise(5, 16)).square().sum().backward()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(ours.get_parameter(name).grad, parameter.grad)  # type: ignore[arg-type]
    assert shapes == []


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("fault", ["missing", "failing", "of another shape", "wrong", "wrong with a bias"])
def test_f_linear_takes_over(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another version of torch makes of its operator, nothing is said and the products are right."""

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if fault == "failing":
            raise RuntimeError("could not create a primitive")
        if fault == "of another shape":
            return F.linear(x, weight)[..., :1]
        return F.linear(x, weight) + (1e-3 if fault == "wrong" else 0)

    known = SimpleNamespace() if fault == "missing" else SimpleNamespace(_linear_pointwise=SimpleNamespace())
    if fault != "missing":
        known._linear_pointwise.default = operator
    monkeypatch.setattr(torch.ops, "mkldnn", known)
    monkeypatch.setattr(module, "SMALLEST", 0)
    x, weight, bias = noise(3, 16), noise(24, 16), noise(24)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert onednn_product() is None


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_by_either_way(
    batch: int, shapes: list[tuple[int, ...]], tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and selections of a prefill, and of steps after it."""
    ids = torch.randint(3, 256, (batch, 1024), generator=torch.Generator().manual_seed(1))
    ends, steps = [], []
    for product in (module.onednn_product, lambda: None):
        monkeypatch.setattr(module, "onednn_product", product)
        begun = tiny_llm.prefill(ids, FastKV(min_tokens=8, tsp_window=0))
        made = len(shapes)
        logits = [begun.logits, *(tiny_llm.decode(begun.cache, token) for token in ids.T[:2])]
        ends.append((torch.stack(logits), torch.cat([kept.flatten() for kept in begun.kept])))
        steps.append(len(shapes) - made)
    (ours, our_choice), (theirs, their_choice) = ends
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(our_choice, their_choice)
    # All tokens; the window's queries, by rows of a matrix; one token.
    assert {(batch, 1024), (batch, 10), (batch, 1)} <= {shape[:2] for shape in shapes}
    assert steps == [2 * (4 * tiny_llm.config.n_layers + 1), 0]


def test_compiled_layers_take_the_same_way(shapes: list[tuple[int, ...]]) -> None:
    """Inductor knows oneDNN's operator and fails on it, with weights that it has not packed itself."""
    try:
        _check_compiler(torch.device("cpu"))
    except FastKVError as error:
        pytest.skip(str(error))
    layer = Linear(16, 24)
    compiled = torch.compile(lambda x: torch.relu(layer(x) + 1), dynamic=True)
    with torch.inference_mode():
        for rows in (4, 6, 40):
            x = noise(2, rows, 16)
            torch.testing.assert_close(compiled(x), torch.relu(layer(x) + 1), atol=1e-5, rtol=1e-5)
    assert shapes == [(2, 4, 16)] * 2 + [(2, 6, 16)] * 2
