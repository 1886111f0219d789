"""Memory for a prefill's activations, which one layer and one request hand to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fastkv.kernels.memory import zeros
from fastkv.models.llama import Llama


class Workspace:
    """Buffers by name that only ever grow. What `take` returns is valid until the name is taken again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def reusable(self, wanted: Mapping[str, int]) -> int:
        """Bytes that are there already, of buffers of these sizes by name."""
        return sum(min(size, self._buffers[name].nbytes) for name, size in wanted.items() if name in self._buffers)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor | Llama) -> Tensor:
        """A tensor of that shape with the dtype and device of `like`; what it holds is left over from before."""
        count = math.prod(shape)
        known = self._buffers.get(name)
        if known is None or known.numel() < count:
            del known
            self._buffers.pop(name, None)  # the old one goes before the new one comes
            self._buffers[name] = zeros((count,), like.dtype, like.device)
        return self._buffers[name][:count].view(shape)
