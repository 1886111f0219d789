"""Host memory in huge pages: where a system has them, a CPU reads much faster from it.

With pages of 4 KiB a core that reads weights looks up an address for every 1,024 float32 values. On a virtual machine
such a lookup walks two tables; what pages of 2 MiB brought there is in docs/speed.md.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from fastkv.kernels.limits import address_space_left

_PAGE = 2 << 20  # bytes of a huge page on x86-64, and on ARM with base pages of 4 KiB
_ALIGNMENT = 64  # bytes: where vectors are loaded from
_SHARE = 16  # a region takes no more than this part of the addresses that a limit leaves
_REGION = 64 << 20  # bytes that are asked of the system at a time; what is never touched takes no memory


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros; on a CPU in huge pages where that is possible and large enough to matter."""
    return HostMemory(math.prod(shape) * dtype.itemsize).zeros(shape, dtype, device)


class HostMemory:
    """Memory for many tensors that stay, one after another. It is freed with the last tensor that lies in it.

    region: bytes that are asked of the system at a time, at the least; where they are few, it is memory like any other.
    """

    def __init__(self, region: int = _REGION) -> None:
        self._region = region
        self._memory: mmap.mmap | None = None
        self._next_byte = self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch.empty; on a CPU next to the tensor before."""
        if not self._holds(shape, device):
            return torch.empty(shape, dtype=dtype, device=device)
        return self._next(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As torch.zeros; on a CPU next to the tensor before. No page is touched."""
        if not self._holds(shape, device):
            return torch.zeros(shape, dtype=dtype, device=device)
        return self._next(shape, dtype)  # the system gives pages of zeros, and no byte is given out twice

    def _holds(self, shape: tuple[int, ...], device: torch.device) -> bool:
        large = self._region >= 2 * _PAGE and math.prod(shape) > 0
        return large and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        taken = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._memory is None or self._next_byte + taken > self._end:
            self._memory, self._next_byte, self._end = self._more(taken)
        offset, self._next_byte = self._next_byte, self._next_byte + taken
        with torch.inference_mode(False):  # what is made while generating may be written to later
            # Each tensor has a storage of its own, which keeps the mapping alive: saving one saves no other.
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)

    def _more(self, nbytes: int) -> tuple[mmap.mmap, int, int]:
        """A region of the usual size, or a smaller one where addresses are few: what is not needed is lost there."""
        left = address_space_left()
        region = self._region if left is None else min(self._region, max(2 * _PAGE, left // _SHARE))
        try:
            return _region(max(nbytes, region))
        except RuntimeError:
            return _region(nbytes)


def _region(nbytes: int) -> tuple[mmap.mmap, int, int]:
    """A mapping with at least so many zero bytes; where in it a huge page begins, and its end."""
    nbytes = -(-nbytes // _PAGE) * _PAGE
    try:
        memory = mmap.mmap(-1, nbytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise RuntimeError(f"the system cannot allocate memory: {nbytes} bytes") from None  # as torch says it
    with suppress(OSError):  # a system that was built without them: the memory is as good, and slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    return memory, first, first + nbytes
