"""Which process a model belongs to. A fork copies memory, but neither threads nor the state of a GPU.

OpenMP keeps its threads for the next piece of work. In a forked process it waits for those of the parent, for ever.
"""

from __future__ import annotations

import os

import torch

from fastkv.errors import FastKVError

_first: int | None = None  # the process in which the first model was loaded, here or before a fork


def process_for_model(device: torch.device) -> int:
    """The number of this process, in which a model is about to be loaded.

    Raises FastKVError where it was forked from one that has used torch's threads, or the GPU, for a model.
    """
    if _first is not None:
        check_process(_first, device)
    return os.getpid()


def has_model() -> None:
    """Note that this process has loaded a model."""
    global _first
    _first = os.getpid() if _first is None else _first


def check_process(process: int, device: torch.device, threads: int | None = None) -> None:
    """FastKVError where a model of this other process cannot run here. threads: that its steps take (None: torch's)."""
    if process == os.getpid():
        return
    way_out = "start processes by multiprocessing's spawn, and load the model in each of them"
    if device.type == "cuda":
        raise FastKVError(f"process {process} has loaded a model, and a fork cannot use the GPU after that; {way_out}")
    if max(torch.get_num_threads(), threads or 1) > 1:
        raise FastKVError(
            f"process {process} has used its threads for a model, and a fork takes none along; {way_out}, or call "
            "torch.set_num_threads(1) before the model is loaded"
        )
