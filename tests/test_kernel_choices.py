"""Attention of one query, threads and dtype by measurement: each way gives the same, and what was measured is taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastkv import LLM, FullKV, SamplingParams
from fastkv.engine import device
from fastkv.engine.attention import decode_attention
from fastkv.kernels import dtypes, products, row_attention, threads
from fastkv.kernels.calibration import Calibration


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    row_attention.forget()
    yield
    row_attention.forget()
    torch.set_num_threads(1)


class Told(Calibration):
    """Says what it was told to say, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        super().__init__(None)
        self.answers, self.questions = list(answers), []  # type: ignore[var-annotated]

    def choose(self, what: str, default: str, names: Any, ways: Any) -> str:
        assert sorted(names) == sorted(ways())
        self.questions.append((what, default, sorted(names)))
        return self.answers.pop(0)


def told(monkeypatch: pytest.MonkeyPatch, module: Any, *answers: str) -> Told:
    found = Told(*answers)
    monkeypatch.setenv("FASTKV_CALIBRATION", "on")
    monkeypatch.setattr(module, "calibration", lambda: found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("way", "group"), [("fused", 1), ("products", 1), ("twice", 1), ("fused", 3), ("products", 3)])
def test_every_way_attends_alike(way: str, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = told(monkeypatch, row_attention, way, way)
    monkeypatch.setattr(row_attention, "_COLD", 2**10)
    generator = torch.Generator().manual_seed(group)
    q = torch.randn(2, 2 * group, 1, 16, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 2, 50, 16, generator=generator).to(dtype).unbind(0)
    found = decode_attention(q, k[:, :, :40], v[:, :, :40])
    expected = F.scaled_dot_product_attention(q.float(), k[:, :, :40].float(), v[:, :, :40].float(), enable_gqa=True)
    bound = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(found.float(), expected, atol=bound, rtol=bound)
    decode_attention(q, k, v)  # of up to 64 entries, too
    ((what, default, ways),) = calibration.questions
    assert what == f"attention of 2 x {group} heads of 16, 64 entries, {str(dtype).removeprefix('torch.')}"
    assert default == ("twice" if group == 1 and dtype is torch.bfloat16 else "fused")
    assert ways == (["fused", "products", "twice"] if group == 1 else ["fused", "products"])


def test_a_step_has_the_threads_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "COLD", 2**10)
    torch.set_num_threads(2)
    calibration = told(monkeypatch, threads, "1", "2")
    weight = torch.zeros(6, 4)
    assert [threads.step_threads(weight) for _ in range(2)] == [1, None]
    assert calibration.questions[0] == ("threads of a step, 6 x 4, float32", "2", ["1", "2"])
    torch.set_num_threads(1)
    assert threads.step_threads(weight) is None
    torch.set_num_threads(2)
    monkeypatch.setenv("FASTKV_CALIBRATION", "off")
    assert threads.step_threads(weight) is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_threads_of_before_come_back(fails: bool) -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError) if fails else threads.as_many(None), threads.as_many(1):
        assert torch.get_num_threads() == 1
        1 / (0 if fails else 1)
    assert torch.get_num_threads() == 2


def test_steps_run_with_them_and_a_prefill_does_not(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    llm = LLM(tiny_folder, dtype="float32", device="cpu")
    llm._runtime.step_threads = 1
    seen: list[int] = []
    project = type(llm.model.blocks[0]).project

    def noted(self: Any, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return project(self, hidden, *rest, **named)

    monkeypatch.setattr(type(llm.model.blocks[0]), "project", noted)
    llm.generate(list(range(3, 60)), SamplingParams(max_tokens=3, ignore_eos=True), FullKV())
    assert seen == [2] * 5 + [1] * 12  # the last layer of a prefill makes its parts one by one


@pytest.mark.parametrize(("measured", "expected"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_auto_is_the_dtype_that_was_measured(measured: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_SIZE", 8)
    calibration = told(monkeypatch, dtypes, measured)
    cpu = torch.device("cpu")
    assert device.resolve_dtype("auto", "bfloat16", cpu) == getattr(torch, expected)
    assert calibration.questions[0][0] == "float32 or bfloat16"
    assert calibration.questions[0][2] == ["bfloat16", "float32"]
    for dtype, stored in (("auto", "float32"), ("float32", "bfloat16")):  # nothing to choose
        assert device.resolve_dtype(dtype, stored, cpu) == torch.float32
    assert len(calibration.questions) == 1


def test_what_is_timed_of_a_dtype_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_SIZE", 8)
    made: list[torch.dtype] = []
    monkeypatch.setattr(dtypes.F, "linear", lambda x, weight: made.append(x.dtype) or x)
    for name, way in dtypes._timed("bfloat16").items():
        way()
        assert set(made) == {getattr(torch, name)}
        made.clear()
