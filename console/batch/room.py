"""How many workers there are to be, what each one asks for, and whether a cluster has room for them. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastkv.errors import FastKVError, brief, check_integer, check_number


@dataclass(frozen=True)
class Wanted:
    """What the flags say; None where they say nothing. address: of a cluster; None: one of its own on this machine."""

    workers: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
    device: str = "auto"
    address: str | None = None

    def check(self) -> None:
        """FastKVError for what no cluster could give."""
        for name, value, most in (("workers", self.workers, 10_000), ("threads", self.threads, 4096)):
            if value is not None:
                check_integer(name, value, 1, most)
        if self.gpus_per_worker is not None:
            check_number("gpus_per_worker", self.gpus_per_worker, 0, 1, above=True)
            if self.device == "cpu":
                raise FastKVError("is for GPUs: leave it out, or --device cpu", setting="gpus_per_worker")
        if self.address is not None:
            check_address(self.address)
        if self.device.startswith("cuda:"):
            raise FastKVError("Ray says which GPU a worker gets: take cuda", setting="device")


def check_address(address: str) -> None:
    """FastKVError for what is no address of a cluster's head, where Ray itself would say something longer."""
    host, colon, port = address.rpartition(":")
    if address != "auto" and not (host and "/" not in host and colon and port.isdecimal() and 0 < int(port) < 65_536):
        raise FastKVError(f"is auto, or HOST:PORT of the cluster's head, not {brief(address)}", setting="address")


@dataclass(frozen=True)
class Machine:
    """What Ray may use of one machine."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Room:
    """What there is to be: `workers`, each with as many CPU `threads` and `gpus`, on `device` (cpu or cuda)."""

    workers: int
    threads: int
    gpus: float
    device: str


def room(wanted: Wanted, machines: Sequence[Machine], n_shards: int) -> Room:
    """No more workers than shards. Raises FastKVError for more than the machines have room for.

    A worker of a cluster asks for one CPU unless `threads` says otherwise; without one, this machine's are shared out,
    and several workers may have one together.
    """
    n_gpus = sum(machine.gpus for machine in machines)
    device = wanted.device if wanted.device != "auto" else "cuda" if n_gpus else "cpu"
    if device == "cuda" and not n_gpus:
        raise FastKVError("Ray knows of no GPU: leave it out, or take cpu", setting="device")
    if wanted.gpus_per_worker is not None and not n_gpus:
        raise FastKVError("Ray knows of no GPU: leave it out", setting="gpus_per_worker")
    gpus = 0.0 if device == "cpu" else 1.0 if wanted.gpus_per_worker is None else wanted.gpus_per_worker
    workers = wanted.workers
    if workers is None:
        workers = max(1, sum(_times(machine.gpus, gpus) for machine in machines)) if gpus else 1
    workers = min(workers, n_shards)
    own = wanted.address is None
    share = int(sum(machine.cpus for machine in machines)) // workers if own else 1
    threads = wanted.threads or max(1, share)
    fit = sum(_fitting(machine, 0 if own else threads, gpus) for machine in machines)
    if fit < workers:
        each = f"{threads} CPU{'s' if threads > 1 else ''}" + (f" and {gpus:g} GPU" if gpus else "")
        raise FastKVError(f"Ray has room for {fit} with {each} each, not for {workers}", setting="workers")
    return Room(workers, threads, gpus, device)


def _fitting(machine: Machine, cpus: float, gpus: float) -> int:
    counts = [_times(have, need) for have, need in ((machine.cpus, cpus), (machine.gpus, gpus)) if need]
    return min(counts, default=10_000)


def _times(have: float, need: float) -> int:
    return int(have / need + 1e-6)
