"""A command of which torchrun has started several processes, the ranks of one model: rank 0 alone speaks.

A complaint is one line, of whichever rank comes first; and a rank that is ended, because another one has, says so.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from fastkv.errors import FastKVError
from fastkv.kernels.torchrun import attempt, rank, store_address, world_size

if TYPE_CHECKING:
    import torch

    from fastkv.kernels.ranks import Ranks

_KEY = "fastkv/said"  # in torchrun's store: how many ranks wanted to have the last word
_PATIENCE = timedelta(seconds=2)  # for that store
_LOOK_EVERY = 1.0  # seconds between two looks whether torchrun is there

_stderr: TextIO | None = None  # the real one of a rank that is silent
_speaking = threading.Lock()


def begin_rank(name: str) -> None:
    """Let all ranks but the first be silent, and each end at once, with one line of one of them, when torchrun says so.

    To be called before any thread is started. Does nothing where there is one process.
    """
    if world_size() == 1:
        return
    if rank() > 0:
        _be_silent()
    with suppress(ValueError, AttributeError):  # not the main thread, or no Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(name,), daemon=True).start()


def check_rank_flags(args: argparse.Namespace) -> None:
    """FastKVError for flags that do not go with several ranks."""
    if world_size() == 1:
        return
    for flag in ("report", "cache", "save_cache", "speculation", "draft_weights", "compile", "offload"):
        if getattr(args, flag, None):
            raise FastKVError("does not go with torchrun: leave it out, or start one process", setting=flag)
    for flag, names in (("prompt", args.prompt), ("prompts", [args.prompts]), ("context", [args.context])):
        if "-" in names:
            raise FastKVError(f"--{flag}: - is standard input, which the ranks cannot share: give a file")


def check_alike(ranks: Ranks | None, device: torch.device, asked: Sequence[object]) -> None:
    """FastKVError where a rank was asked other things than rank 0: files may differ from host to host.

    asked: what the command has read, prompts and settings, as values whose repr tells them apart.
    """
    if ranks is None:
        return
    mine = hashlib.sha256(repr(asked).encode("utf-8", "backslashreplace")).hexdigest()
    if mine != ranks.text(mine, device):
        raise FastKVError(
            f"rank {ranks.rank} has read other prompts or settings than rank 0: all hosts need the same files"
        )


def check_alone(name: str) -> None:
    """FastKVError where torchrun has started several processes of a command that knows no ranks."""
    if world_size() > 1:
        raise FastKVError(f"{name} runs in one process: start it without torchrun (fastkv-run goes with torchrun)")


def last_words(line: str, store: bool = True) -> bool:
    """Whether it is this rank that says why all end: the first of them, and here it is said.

    store: whether there is one to ask which is the first; else rank 0 is.
    """
    with _speaking:
        if not (_is_first() if store else rank() == 0):
            return False
        stream = sys.stderr if _stderr is None else _stderr
        with suppress(OSError, ValueError):
            print(line, file=stream, flush=True)
        return True


def end_rank() -> None:
    """Leave the other ranks in good order, when all is done."""
    distributed = sys.modules.get("torch.distributed")
    if world_size() > 1 and distributed is not None and distributed.is_initialized():
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def _is_first() -> bool:
    address = store_address()
    if address is None:
        return rank() == 0
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(*address, is_master=False, timeout=_PATIENCE, wait_for_workers=False)
        return store.add(f"{_KEY}/{attempt()}", 1) == 1
    except RuntimeError:  # the host of the store has gone
        return rank() == 0


def _be_silent() -> None:
    global _stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if sys.stderr is not None:
        sys.stderr.flush()
        _stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _end_when_told(name: str) -> None:
    """Wait for torchrun's signal, which it sends when one of the processes has ended, or for its own end.

    Works while torch computes.
    """
    starter = os.getppid()
    while signal.sigtimedwait({signal.SIGTERM}, _LOOK_EVERY) is None:
        if os.getppid() != starter:
            last_words(f"{name}: error: torchrun has ended, and so does what it has started", store=False)
            os._exit(1)
    others = f"another of the {world_size()} processes has ended, or it was told to"
    last_words(f"{name}: error: ended by torchrun: {others}")
    os._exit(1)
