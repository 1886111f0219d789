"""Blocks come to the device whole and in time, however late or early copies run; memory is pinned, and let go."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv.engine.offloading.host_blocks import CudaLanes, OneLane, blocks_of
from fastkv.engine.workspace import HostStore, Workspace, copy
from fastkv.kernels import pinned

ENTRIES = torch.arange(2 * 23 * 4 * 2, dtype=torch.float32).view(2, 23, 4, 2)
BLOCKS = [(0, 5), (5, 10), (10, 14), (14, 19), (19, 23)]


class LateLanes(OneLane):
    """As late as may be: a copy runs when somebody waits for it, after all that it has to wait for itself."""

    def __init__(self) -> None:
        self.waiting: dict[int, Callable[[], None]] = {}
        self.ended = 0

    def fill(self, slot: int, target: Tensor, source: Tensor) -> None:
        self.waiting[slot] = lambda: copy(target, source)

    def use(self, slot: int) -> None:
        self.waiting.pop(slot)()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("lanes", [OneLane, LateLanes])
def test_each_block_is_there_when_it_is_used(lanes: Callable[[], Any]) -> None:
    """Early: a block would be written over that is still in use. Late: one would be used that is not there."""
    buffers = [torch.full((2, 5, 4, 2), -1.0) for _ in range(2)]
    found = [block.clone() for block in blocks_of(ENTRIES, BLOCKS, buffers, lanes())]
    assert torch.equal(torch.cat(found, dim=1), ENTRIES)
    assert [block.shape[1] for block in found] == [5, 5, 4, 5, 4]
    assert list(blocks_of(ENTRIES, [], buffers, lanes())) == []


def test_one_that_is_left_early_waits_for_what_is_under_way() -> None:
    lanes = LateLanes()
    blocks = blocks_of(ENTRIES, BLOCKS, [torch.empty(2, 5, 4, 2) for _ in range(2)], lanes)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert lanes.ended == 1


# --- CUDA's streams, which are not here: who waits for whom ---


class Told:
    """Streams and events in name, which write down what they are told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names = iter(("filled 0", "filled 1", "freed 0", "freed 1"))
        self.work, self.copies = self.stream("work"), self.stream("copies")

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.lines.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.lines.append(f"{name} waits for {event.name}"),
        )

    def event(self) -> Any:
        name = next(self.names)
        return SimpleNamespace(name=name, record=lambda stream: self.lines.append(f"{name} by {stream.name}"))


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: told.copies)
    monkeypatch.setattr(torch.cuda, "Event", told.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: told.work)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    lanes = CudaLanes(torch.device("cuda"))
    for number, _ in enumerate(blocks_of(ENTRIES, BLOCKS[:3], [torch.empty(2, 5, 4, 2) for _ in range(2)], lanes)):
        told.lines.append(f"block {number}")
    assert told.lines == [
        "copies waits for work",
        *("copies waits for freed 0", "filled 0 by copies"),
        *("copies waits for freed 1", "filled 1 by copies"),
        *("work waits for filled 0", "block 0", "freed 0 by work"),
        *("copies waits for freed 0", "filled 0 by copies"),
        *("work waits for filled 1", "block 1", "freed 1 by work"),
        *("work waits for filled 0", "block 2", "freed 0 by work"),
        "work waits for copies",
    ]


# --- pinned memory ---


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes that CUDA has been told of, by address; as many at a time as 1000."""
    found: dict[int, int] = {}

    def register(address: int, nbytes: int, flags: int) -> int:
        if nbytes > 1000:
            return 2
        found[address] = nbytes
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=found.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def test_memory_is_pinned_exactly_and_let_go(registered: dict[int, int]) -> None:
    memory = pinned.pinned_zeros(70, torch.bfloat16)
    assert (memory.shape, memory.dtype, float(memory.abs().sum())) == ((70,), torch.bfloat16, 0)
    assert registered == {memory.data_ptr(): 140}
    assert pinned.pinned_zeros(0, torch.float32).numel() == 0
    del memory
    gc.collect()
    assert registered == {}


def test_what_cannot_be_pinned_is_ordinary_memory(registered: dict[int, int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert pinned.pinned_zeros(500, torch.float32).shape == (500,)
    assert "2000 bytes of host memory are not pinned (CUDA error 2): offload is slower" in caplog.text
    assert registered == {}


def test_a_store_pins_what_a_gpu_is_to_read(registered: dict[int, int]) -> None:
    like: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    workspace = Workspace()
    kept = workspace.host.take("host hidden", (3, 4), like)
    assert list(registered.values()) == [48]
    assert kept.device.type == "cpu"
    assert workspace.reusable({"host hidden": 100, "hidden": 100}) == 48
    assert workspace.nbytes == 48
    assert HostStore().take("host hidden", (3, 4), torch.empty(0)).shape == (3, 4)
    assert len(registered) == 1
