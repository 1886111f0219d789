"""Memory for a prefill's activations, which one layer and one request hand to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastkv.kernels.memory import zeros
from fastkv.kernels.pinned import pinned_zeros
from fastkv.models.llama import Llama


class Workspace:
    """Buffers by name that only ever grow. What `take` returns is valid until the name is taken again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._host: HostStore | None = None

    @property
    def host(self) -> HostStore:
        """The buffers of an offloaded prefill (engine/offloading/run.py)."""
        if self._host is None:
            self._host = HostStore()
        return self._host

    @property
    def nbytes(self) -> int:
        own = sum(buffer.nbytes for buffer in self._buffers.values())
        return own if self._host is None else own + self._host.nbytes

    def reusable(self, wanted: Mapping[str, int]) -> int:
        """Bytes that are there already, of buffers of these sizes by name."""
        own = sum(min(size, self._buffers[name].nbytes) for name, size in wanted.items() if name in self._buffers)
        return own if self._host is None else own + self._host.reusable(wanted)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor | Llama) -> Tensor:
        """A tensor of that shape with the dtype and device of `like`; what it holds is left over from before."""
        count = math.prod(shape)
        known = self._buffers.get(name)
        if known is None or known.numel() < count:
            del known
            self._buffers.pop(name, None)  # the old one goes before the new one comes
            self._buffers[name] = self._new(count, like)
        return self._buffers[name][:count].view(shape)

    def _new(self, count: int, like: Tensor | Llama) -> Tensor:
        return zeros((count,), like.dtype, like.device)


class HostStore(Workspace):
    """Buffers in host memory, whose names no other workspace has, and the ways from there to the device and back.

    Whatever crosses crosses here, or by `copy`. On a CPU both sides are one, and nothing is copied that need not be.
    """

    def to_host(self, x: Tensor) -> Tensor:
        """x on the host, when the device has made it."""
        return x.cpu()

    def to_device(self, x: Tensor, device: torch.device) -> Tensor:
        return x.to(device)

    def wait(self, device: torch.device) -> None:
        """Until what was copied to the host is there: for those who read it without the device."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _new(self, count: int, like: Tensor | Llama) -> Tensor:
        if like.device.type == "cuda":
            return pinned_zeros(count, like.dtype)
        return super()._new(count, like)


def copy(target: Tensor, source: Tensor) -> None:
    """Between host and device, in the order of the device's work: target and source [B, T, …], each sequence dense.

    The host goes on meanwhile, so that source is not to be let go, or written to by the host, before `HostStore.wait`.
    """
    for to, of in zip(target, source, strict=True):  # one piece of memory each: else torch makes copies of its own
        to.copy_(of, non_blocking=True)
