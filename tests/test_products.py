"""Products are those of F.linear, whichever way makes them; and where another way fails, F.linear makes them."""

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
from fastkv.kernels import products as module
from fastkv.kernels.products import ways_of
from fastkv.models.linear import Linear, linear


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice made, and matrices of any size worth one."""
    monkeypatch.setattr(module, "SMALLEST", 0)
    module.forget()
    yield
    module.forget()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x of every product that oneDNN makes."""
    ways = ways_of(torch.float32)
    if "onednn" not in ways:
        pytest.skip("no product by oneDNN here")
    seen: list[tuple[int, ...]] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return ways["onednn"](x, weight, bias)

    monkeypatch.setattr(
        module, "ways_of", lambda dtype: {**ways, "onednn": recorded} if dtype is torch.float32 else ways
    )
    return seen


@pytest.fixture
def untried() -> Iterator[None]:
    """As if no way had ever been tried."""
    ways_of.cache_clear()
    yield
    ways_of.cache_clear()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: noise(1, 40),
    "one token": lambda: noise(1, 1, 40),
    "two tokens": lambda: noise(1, 2, 40),
    "several sequences": lambda: noise(7, 1, 40),
    "a chunk": lambda: noise(1, 2048, 40),
    "a chunk of several sequences": lambda: noise(2, 700, 40)[:, 100:612],
    "last tokens": lambda: noise(3, 9, 40)[:, -1],
    "every second value": lambda: noise(4, 80)[:, ::2],
    "turned heads": lambda: noise(1, 4, 5, 10).transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("way", ["onednn", "turned", "split", "halves"])
@pytest.mark.parametrize("which", X)
def test_products_are_those_of_f_linear(which: str, way: str) -> None:
    """Whole matrices and rows of one, with biases and without, of x in any layout.

    In one order of memory: what is compiled for one way must hold for any.
    """
    x, weight, bias = X[which](), noise(60, 40), noise(60)
    if way not in ways_of(torch.float32) or (way in ("split", "halves") and x.numel() > 40):
        pytest.skip("this way is not for these here")
    pairs = [
        (weight, None),
        (weight, bias),
        (weight[20:50], bias[20:50]),
        (weight[:31], bias[:31]),
        (weight, noise(120)[::2]),
        (weight[::3], None),
    ]
    with torch.inference_mode():
        for weight, bias in pairs:
            found = ways_of(torch.float32)[way](x, weight, bias)
            torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
            assert found.is_contiguous()


def test_only_what_can_gain_goes_to_onednn(shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a kernel of every shape for good, so it sees few numbers of rows; and it knows no gradients."""
    layer = Linear(16, 24)
    with torch.inference_mode():
        for rows in (1, 32, 33, 500, 1024, 1500, 4096):
            layer(noise(rows, 16))
        assert [rows for rows, _ in shapes] == [1, 32, 1024, 4096]
        Linear(16, 24, dtype=torch.bfloat16)(noise(1, 16).bfloat16())
        module.forget()
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
    x, weight, bias = noise(3, 16), noise(24, 16), noise(24)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert "onednn" not in ways_of(torch.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_by_either_way(
    batch: int, shapes: list[tuple[int, ...]], tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and selections of a prefill, and of steps after it."""
    ids = torch.randint(3, 256, (batch, 1024), generator=torch.Generator().manual_seed(1))
    ends, steps = [], []
    for smallest in (0, 2**40):
        module.forget()
        monkeypatch.setattr(module, "SMALLEST", smallest)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_multiply_alike(dtype: torch.dtype) -> None:
    """One row as a loop of the compiler's own; several by the same ways as without it."""
    try:
        _check_compiler(torch.device("cpu"))
    except FastKVError as error:
        pytest.skip(str(error))
    layer = Linear(16, 24, dtype=dtype)
    one, many = (torch.compile(lambda x: torch.relu(layer(x) + 1), dynamic=dynamic) for dynamic in (False, True))
    bound = 1e-5 if dtype is torch.float32 else 0.03
    with torch.inference_mode():
        for compiled, batch, rows in ((one, 1, 1), (many, 2, 4), (many, 2, 6), (many, 2, 40)):
            x = noise(batch, rows, 16).to(dtype)
            torch.testing.assert_close(compiled(x), torch.relu(layer(x) + 1), atol=bound, rtol=bound)
