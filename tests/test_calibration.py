"""Choices by measurement: the fastest way, remembered, and never a wrong one. The clock is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkv.kernels import calibration as module
from fastkv.kernels import products
from fastkv.kernels.calibration import Calibration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], object]]:
    """Time passes only in what this makes: work of so many seconds."""
    now = [0.0]
    monkeypatch.setattr(module, "_clock", lambda: now[0])

    def lasting(seconds: float) -> Callable[[], object]:
        def work() -> None:
            now[0] += seconds

        return work

    return lasting


Clock = Callable[[float], Callable[[], object]]


WAYS = ("plain", "other", "third", "fast")


def broken() -> object:
    raise RuntimeError("no such operator")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"plain": 0.01, "other": 0.005}, "other"),
        ({"plain": 0.01, "other": 0.02}, "plain"),
        ({"plain": 0.01, "other": 0.0098}, "plain"),  # too little to tell
        ({"plain": 0.01, "other": 0.009, "third": 0.008}, "third"),
        ({"plain": 5.0, "other": 4.0}, "other"),  # one counted run each
        ({"plain": None, "other": 4.0}, "other"),
        ({"plain": 0.1, "other": None}, "plain"),
        ({"plain": None, "other": None}, "plain"),
    ],
)
def test_the_fastest_way_that_works(seconds: dict[str, float | None], expected: str, clock: Clock) -> None:
    ways = {name: broken if taken is None else clock(taken) for name, taken in seconds.items()}
    found = Calibration(None)
    assert found.choose("x", "plain", WAYS, lambda: ways) == expected
    assert found.asked()["x"].seconds == pytest.approx({name: s for name, s in seconds.items() if s is not None})


def test_the_first_run_of_a_way_does_not_count(clock: Clock) -> None:
    """Kernels are made, and caches filled, in it."""
    first, later = clock(9.0), clock(0.01)
    runs: list[int] = []

    def slow_start() -> None:
        (later if runs else first)()
        runs.append(1)

    assert Calibration(None).choose("x", "plain", WAYS, lambda: {"plain": clock(0.05), "other": slow_start}) == "other"


def test_too_little_memory_to_measure_is_no_reason_to_fail(tmp_path: Path, clock: Clock) -> None:
    """It is the default then, and is measured another time."""
    made = Calibration(tmp_path / "choices.json")

    def no_room() -> dict[str, Callable[[], object]]:
        raise RuntimeError("the system cannot allocate memory: 67108864 bytes")

    assert made.choose("this", "slow", ("slow", "fast"), no_room) == "slow"
    assert made.choose("this", "slow", ("slow", "fast"), lambda: {"slow": clock(2), "fast": clock(1)}) == "fast"

    def wrong() -> dict[str, Callable[[], object]]:
        raise RuntimeError("no such operator")

    with pytest.raises(RuntimeError, match="no such operator"):
        made.choose("that", "slow", ("slow", "fast"), wrong)


def test_a_choice_stays(tmp_path: Path, clock: Clock) -> None:
    """In the process and on the disk; what another process wrote meanwhile stays, too."""
    file = tmp_path / "new" / "choices.json"
    one, other = Calibration(file), Calibration(file)
    assert one.choose("x", "plain", WAYS, lambda: {"plain": clock(2), "fast": clock(1)}) == "fast"
    assert one.choose("x", "plain", WAYS, lambda: pytest.fail("measured again")) == "fast"
    assert other.choose("y", "plain", WAYS, lambda: {"plain": clock(1), "fast": clock(2)}) == "plain"
    assert other.choose("x", "plain", WAYS, lambda: pytest.fail("measured again")) == "fast"
    assert Calibration(file).choose("y", "fast", WAYS, lambda: pytest.fail("measured again")) == "plain"
    assert set(json.loads(file.read_text())["choices"]) == {"x", "y"}
    assert [path.name for path in file.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 99, "choices": {"x": {"way": "odd", "seconds": {}}}}', '{"format": 1}'],
)
def test_a_broken_file_is_measured_anew(content: str, tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "choices.json"
    file.write_text(content)
    assert Calibration(file).choose("x", "plain", WAYS, lambda: {"plain": clock(1)}) == "plain"
    assert json.loads(file.read_text())["choices"]["x"]["way"] == "plain"


@pytest.mark.parametrize(
    "entry", ['{"way": "of another version", "seconds": {}}', '{"way": "fast", "seconds": {"fast": NaN}}']
)
def test_what_is_not_for_this_version_is_measured_anew(entry: str, tmp_path: Path, clock: Clock) -> None:
    """And written over, so that the next process knows."""
    file = tmp_path / "choices.json"
    file.write_text(f'{{"format": 1, "choices": {{"x": {entry}}}}}')
    found = Calibration(file)
    assert found.choose("x", "plain", WAYS, lambda: {"plain": clock(2), "fast": clock(1)}) == "fast"
    assert found.asked()["x"].seconds == {"plain": 2, "fast": 1}
    assert Calibration(file).choose("x", "plain", WAYS, lambda: pytest.fail("measured again")) == "fast"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("FASTKV_CACHE", "~nobody-of-this-name/cache")
    assert module.calibration().choose("x", "plain", WAYS, lambda: {"plain": clock(1)}) == "plain"


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").write_text("")
    found = Calibration(tmp_path / "file" / "choices.json")
    assert found.choose("x", "plain", WAYS, lambda: {"plain": clock(1)}) == "plain"


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_off_measures_and_writes_nothing(value: str, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setenv("FASTKV_CALIBRATION", value)
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "_timed", lambda *_: pytest.fail("measured"))
    products.forget()
    weight = torch.zeros(8, 8)
    assert products.product_for(1, weight) is products.product_for(1, weight)
    assert not cache_folder.exists()
    products.forget()


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKV_CALIBRATION", "on")
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "COLD", 2**12)
    products.forget()


@pytest.mark.usefixtures("measuring")
@pytest.mark.parametrize(("rows", "kind"), [(1, 1), (2, 4), (8, 8), (9, 32), (32, 32), (1024, 1024), (4096, 1024)])
def test_products_are_chosen_for_rows_and_sizes(
    rows: int, kind: int, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is on the disk for these; the file of another machine is never looked at."""
    made: list[str] = []

    def way(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append("other")
        return F.linear(x, weight, bias)

    monkeypatch.setattr(products, "ways_of", lambda dtype: {"linear": F.linear, "onednn": F.linear, "other": way})
    products.product_for(rows, torch.zeros(6, 4))
    (file,) = (cache_folder / "calibration").iterdir()
    content = json.loads(file.read_text())
    (what,) = content["choices"]
    assert what == f"product of {kind} x 4 with 6 x 4, float32"
    content["choices"][what]["way"] = "other"
    file.write_text(json.dumps(content))
    module._calibration.cache_clear()
    products.forget()
    made.clear()
    products.product_for(rows, torch.zeros(6, 4))(torch.zeros(rows, 4), torch.zeros(6, 4), None)
    assert made == ["other"]
    content["choices"][what]["way"] = "of another version"
    file.write_text(json.dumps(content))
    module._calibration.cache_clear()
    products.forget()
    assert products.product_for(rows, torch.zeros(6, 4)) is F.linear
    products.forget()


@pytest.mark.usefixtures("measuring")
def test_what_is_timed_comes_from_memory_and_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many matrices that a cache cannot hold them, but one where many rows share it."""
    weight = torch.arange(12.0).view(3, 4)
    seen: list[tuple[int, ...]] = []

    def way(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        assert torch.equal(matrix, weight)
        seen.append(tuple(x.shape))
        return F.linear(x, matrix, bias)

    products._timed(1, weight, {"way": way})["way"]()
    assert seen == [(1, 4)] * (2**12 // weight.nbytes)
    seen.clear()
    products._timed(1024, weight, {"way": way})["way"]()
    assert seen == [(1024, 4)]
