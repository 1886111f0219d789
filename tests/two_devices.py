"""A CPU that keeps apart what would lie on a GPU and what on the host: no tensor of one may meet one of the other.

Where no GPU is, both sides of an offloaded prefill are one, and a tensor on the wrong side would not be noticed. Here
each tensor has a side: that of what it was made from, or the first one it meets. Only HostStore and `copy` cross.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from test_peak_memory import Alive
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastkv.engine import workspace
from fastkv.engine.offloading import host_blocks
from fastkv.engine.offloading import run as offload
from fastkv.engine.offloading.run import OffloadedRun
from fastkv.engine.prefill import LayerRun
from fastkv.engine.workspace import HostStore, Workspace

HOST, DEVICE = "host", "device"


class TwoDevices(Alive):
    """Also counts the bytes that are alive at most on each side: `most`."""

    def __init__(self, model: torch.nn.Module, *on_device: Tensor) -> None:
        super().__init__(model)
        self.sides: dict[int, str] = dict.fromkeys(self.before, DEVICE)
        self.sides |= dict.fromkeys((each.untyped_storage()._cdata for each in on_device), DEVICE)
        self.there = {HOST: 0, DEVICE: 0}
        self.most = {HOST: 0, DEVICE: 0}
        self.crossing, self.usual = False, DEVICE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor) and each.dim()]
        sides = {side for each in given if (side := self.sides.get(_key(each)))}
        assert len(sides) < 2 or self.crossing, f"{func} of tensors on host and device"
        result = func(*args, **(kwargs or {}))
        side = next(iter(sides)) if len(sides) == 1 and not self.crossing else None
        for tensor in [*given, *(each for each in tree_leaves(result) if isinstance(each, Tensor))]:
            if side is not None and _key(tensor) not in self.sides:
                self.put(tensor, side)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return result

    @contextmanager
    def made_on(self, side: str) -> Iterator[None]:
        """What is made here of nothing is on this side."""
        before, self.usual = self.usual, side
        yield
        self.usual = before

    def put(self, tensor: Tensor, side: str) -> Tensor:
        """It is on this side."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self.before:
            return tensor
        if not self.holders[key]:
            self._hold(tensor)
        self.there[self.sides.get(key, DEVICE)] -= size
        self._add(side, size)
        self.sides[key] = side
        return tensor

    def _add(self, side: str, size: int) -> None:
        self.there[side] += size
        self.most[side] = max(self.most[side], self.there[side])

    def _hold(self, tensor: Tensor) -> None:
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self.before:
            return
        if not self.holders[key]:
            if self.usual == HOST:
                self.sides[key] = HOST
            self._add(self.sides.get(key, DEVICE), size)
        self.holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.there[self.sides.pop(key, DEVICE)] -= size


def _key(tensor: Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


@contextmanager
def two_devices(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, *on_device: Tensor) -> Iterator[TwoDevices]:
    """What runs inside runs on two; on_device: tensors that are there before, besides the model's."""
    apart = TwoDevices(model, *on_device)
    make: Callable[..., Tensor] = HostStore._new
    make_there: Callable[..., Tensor] = Workspace._new
    choose: Callable[..., Any] = LayerRun.select

    def new(self: HostStore, count: int, like: Any) -> Tensor:
        with apart.made_on(HOST):
            return apart.put(make(self, count, like), HOST)

    def new_there(self: Workspace, count: int, like: Any) -> Tensor:
        with apart.made_on(HOST if isinstance(self, HostStore) else DEVICE):
            return make_there(self, count, like)

    def select(self: OffloadedRun, *given: Any) -> Any:
        with apart.made_on(HOST):
            return choose(self, *given)

    def moved(side: str) -> Callable[..., Tensor]:
        def move(self: HostStore, x: Tensor, device: object = None) -> Tensor:
            here = apart.sides.get(_key(x))
            assert here != side or not x.numel(), f"it is on the {side} already"
            apart.crossing = True
            with apart.made_on(side):
                there = apart.put(torch.empty(x.shape, dtype=x.dtype), side)
            there.copy_(x)
            apart.crossing = False
            return there

        return move

    def copy(target: Tensor, source: Tensor) -> None:
        here = apart.sides.get(_key(source), DEVICE)
        across = HOST if here == DEVICE else DEVICE
        assert apart.sides.get(_key(target), across) == across, f"a copy from {here} to {here}"
        apart.put(target, across)
        apart.crossing = True
        target.copy_(source)
        apart.crossing = False

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "_new", new_there)
        patched.setattr(HostStore, "_new", new)
        patched.setattr(OffloadedRun, "select", select, raising=False)
        patched.setattr(HostStore, "to_host", moved(HOST))
        patched.setattr(HostStore, "to_device", moved(DEVICE))
        for module in (host_blocks, offload, workspace):
            patched.setattr(module, "copy", copy)
        with apart:
            yield apart
