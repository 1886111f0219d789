"""What torchrun tells the processes that it starts, by their environment. Imports no torch."""

from __future__ import annotations

import os

_TOLD = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """How many processes torchrun has started with this one, on all hosts; 1 where it has started none."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TOLD) else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def started_here() -> int:
    """How many of them are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def local_rank() -> int:
    """This process's number among those on this host."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def store_address() -> tuple[str, int] | None:
    """Where torchrun's own store is that all of them reach, and that lives as long as any of them; None: none is."""
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def attempt() -> str:
    """Which start of the processes this is: torchrun may start them anew."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
