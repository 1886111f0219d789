"""The processes that hold one model together: each of them, a rank, has a part of every matrix and of every cache.

All ranks run the same program over the same requests. Where a layer needs what the others have, they meet here:
everything else of the engine knows no more than `sum_` and `join`. How the parts are cut stands in models/split.py.

Tensor parallelism after Megatron-LM (arXiv 1909.08053): heads and MLP columns are split, and two sums a layer join
them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastkv.errors import FastKVError, FaultError, check_integer
from fastkv.kernels.torchrun import local_rank, started_here, world_size

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class RankLostError(FaultError):
    """Another rank has ended, or cannot be reached: nothing can be computed any more."""


class Ranks:
    """What the ranks of a model do together. Each call waits for all of them, which must make the same calls.

    rank: this one's number, from 0. count: how many there are, at least 2. on_host: how many of them share this host's
    memory. A subclass says how tensors get from one to the others.
    """

    def __init__(self, rank: int, count: int, on_host: int) -> None:
        self.rank, self.count, self.on_host = rank, count, on_host

    def sum_(self, x: Tensor) -> Tensor:
        """x of any shape and dtype -> the sum of all ranks' x, in its place."""
        raise NotImplementedError

    def gather(self, x: Tensor) -> Sequence[Tensor]:
        """x of every rank, all of one shape, by rank."""
        raise NotImplementedError

    def join(self, x: Tensor, dim: int) -> Tensor:
        """What the ranks have of a tensor, one after the other along `dim`; equally much each."""
        return torch.cat(list(self.gather(x)), dim=dim)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of what `join` gave."""
        size = x.shape[dim] // self.count
        return x.narrow(dim, self.rank * size, size)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest number that any rank has."""
        mine = torch.tensor([number], dtype=torch.int64, device=device)
        return min(int(each) for each in self.gather(mine))

    def largest(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Of each of these numbers the largest that any rank has."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        most: list[int] = torch.stack(list(self.gather(mine))).amax(dim=0).tolist()
        return most

    def number(self, number: int, device: torch.device) -> int:
        """What rank 0 has."""
        mine = torch.tensor([number], dtype=torch.int64, device=device)
        return int(self.gather(mine)[0])

    def seed(self, device: torch.device) -> int:
        """A new seed for what is drawn at random, the same on all ranks."""
        return self.number(secrets.randbits(63), device)

    def text(self, text: str, device: torch.device) -> str:
        """What rank 0 has; the others' is not looked at."""
        data = text.encode("utf-8", "surrogatepass") if self.rank == 0 else b""
        length = self.number(len(data), device)
        row = torch.zeros(length, dtype=torch.uint8, device=device)
        if self.rank == 0 and length:
            row.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return bytes(self.gather(row)[0].tolist()).decode("utf-8", "surrogatepass") if length else ""


class Across:
    """What a module needs of the other ranks; None: it has the whole of its parameters. See models/split.py."""

    ranks: Ranks | None = None


class ProcessRanks(Ranks):
    """Ranks that are processes, by torch.distributed: NCCL on GPUs, gloo on CPUs.

    They are made once in a process (`of_this_process`), and end with it.
    """

    _made: ClassVar[ProcessRanks | None] = None

    @classmethod
    def of_this_process(cls, kind: str) -> ProcessRanks:
        """Those that torchrun has started (check_started). kind: "cpu" or "cuda".

        Raises FastKVError where they have met on another kind, and RankLostError where one is missing.
        """
        if cls._made is None:
            cls._made = cls(kind)
        elif cls._made.kind != kind:
            raise FastKVError(f"the ranks of this process have met on {cls._made.kind}: take that device here, too")
        return cls._made

    def __init__(self, kind: str) -> None:
        import torch.distributed as dist

        self.kind, self._dist = kind, dist
        if not dist.is_initialized():
            settings: dict[str, Any] = {}
            if kind == "cuda":
                settings["device_id"] = rank_device()
                torch.cuda.set_device(settings["device_id"])  # NCCL works on the current one
            _together(dist.init_process_group, _BACKENDS[kind], **settings)
        super().__init__(dist.get_rank(), dist.get_world_size(), started_here())

    def sum_(self, x: Tensor) -> Tensor:
        whole = x.contiguous()
        _together(self._dist.all_reduce, whole)
        return x if whole is x else x.copy_(whole)

    def gather(self, x: Tensor) -> Sequence[Tensor]:
        parts = x.new_empty((self.count, *x.shape)).unbind()
        _together(self._dist.all_gather, list(parts), x.contiguous())
        return parts


def _together(meet: Callable[..., object], *args: Any, **settings: Any) -> None:
    """Meet the other ranks; a connection that is lost is one line."""
    try:
        meet(*args, **settings)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLostError("another rank has ended, or cannot be reached, and no rank can go on alone") from error


def rank_device() -> torch.device:
    """The GPU of this process: the one with its number on this host."""
    return torch.device("cuda", local_rank())


def check_started(count: int) -> None:
    """FastKVError unless torchrun has started `count` processes, of which this is one."""
    check_integer("tensor_parallel", count, 1)
    found = world_size()
    if count > 1 and found == 1:
        raise FastKVError(
            f"tensor_parallel {count} takes {count} processes: start the program by torchrun --nproc-per-node {count}",
            setting="tensor_parallel",
        )
    if count > 1 and found != count:
        raise FastKVError(
            f"tensor_parallel is {count}, but torchrun has started {found} processes: the two must be equal",
            setting="tensor_parallel",
        )
