"""Memory in huge pages is memory like any other."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from fastkv.engine.memory import explain_out_of_memory
from fastkv.errors import FastKVError
from fastkv.kernels import memory as module
from fastkv.kernels.memory import HostMemory, zeros
from fastkv.kernels.out_of_memory import REQUEST

CPU = torch.device("cpu")
needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without advice on pages")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3,), (0, 4), (1025, 2049), ()])
def test_zeros_are_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = zeros(shape, dtype, CPU)
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))
    found.add_(1)  # it can be written to


def test_tensors_do_not_touch_each_other() -> None:
    memory = HostMemory()
    made = [
        memory.empty(shape, dtype, CPU) for shape in ((5, 3), (7,), (0, 2)) for dtype in (torch.int8, torch.float32)
    ]
    made.append(memory.empty((5000, 5000), torch.float32, CPU))  # more than is taken at a time
    made.append(memory.empty((3,), torch.float32, CPU))
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    for number, tensor in enumerate(made):
        assert tensor.is_contiguous()
        assert bool((tensor == number).all())
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


@needs_advice
def test_large_memory_begins_with_a_huge_page() -> None:
    assert HostMemory().empty((3,), torch.float32, CPU).data_ptr() % 2**21 == 0
    assert zeros((2**21,), torch.float32, CPU).data_ptr() % 2**21 == 0


def test_what_is_made_while_generating_can_be_written_to_later() -> None:
    with torch.inference_mode():
        found = zeros((2**21,), torch.float32, CPU)
    found.add_(1)
    assert not found.is_inference()


@needs_advice
def test_memory_is_freed_with_the_last_tensor() -> None:
    def mapped() -> int:
        return int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line).split()[1]
        )

    if not Path("/proc/self/status").exists():
        pytest.skip("a system that does not say")
    before = mapped()
    large = HostMemory().empty((2**27,), torch.float32, CPU)
    part = large[:5]
    del large
    assert mapped() - before > 400_000  # KiB
    del part
    gc.collect()
    assert mapped() - before < 100_000


@needs_advice
def test_few_addresses_are_not_wasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `ulimit -v` a small model takes no region of the usual size; where even a small one fails, its tensor's."""
    asked: list[int] = []
    real = module._region

    def watched(nbytes: int) -> tuple[mmap.mmap, int, int]:
        asked.append(nbytes)
        if nbytes > 2**22:
            raise RuntimeError("the system cannot allocate memory")
        return real(nbytes)

    monkeypatch.setattr(module, "_region", watched)
    for left in (None, 2**28, 2**20):
        monkeypatch.setattr(module, "address_space_left", lambda left=left: left)
        HostMemory().empty((1000,), torch.float32, CPU).fill_(1)
    assert asked == [2**26, 4032, 2**24, 4032, 2**22]


@needs_advice
def test_memory_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(FastKVError, match=r"out of memory .*take a shorter prompt"), explain_out_of_memory(REQUEST):
        zeros((2**55,), torch.float32, CPU)


@needs_advice
def test_saving_one_tensor_saves_no_other(tmp_path: Path) -> None:
    memory = HostMemory()
    small, other = memory.empty((3,), torch.float32, CPU).fill_(1), memory.empty((4,), torch.int8, CPU).fill_(2)
    torch.save({"small": small, "other": other}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 10_000
    assert torch.equal(torch.load(tmp_path / "file")["small"], small)
    assert small.untyped_storage().nbytes() == 12
