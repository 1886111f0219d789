"""Host memory that a GPU copies to and from while it computes: pages that stay where they are ("pinned").

Exactly as much as is asked for: torch's own pinned memory is rounded up to a power of two, which would cost up to as
much again of memory that is all there is. Never run on a GPU so far.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from fastkv.kernels.memory import zeros

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU

_log = logging.getLogger(__name__)


def pinned_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros on the host. Where the system pins no more memory, ordinary ones: copies then wait for each other.

    They are pinned while the tensor itself is there; a view of it does not keep them so.
    """
    memory = zeros((count,), dtype, torch.device("cpu"))
    if not count:
        return memory
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
    if error:
        _log.warning("%d bytes of host memory are not pinned (CUDA error %d): offload is slower", memory.nbytes, error)
        return memory
    # Not when the process ends: CUDA may have gone before.
    weakref.finalize(memory, _unpin, memory.data_ptr()).atexit = False
    return memory


def _unpin(address: int) -> None:
    with suppress(RuntimeError):  # of a GPU that has failed meanwhile
        torch.cuda.synchronize()  # nothing copies any more
        torch.cuda.cudart().cudaHostUnregister(address)
