"""Where a model runs and in which dtype: what "auto" means, and what is refused."""

from __future__ import annotations

import torch

from fastkv.errors import FastKVError, brief, check_choice
from fastkv.kernels.dtypes import faster_dtype
from fastkv.kernels.ranks import rank_device
from fastkv.models.config import DTYPES

_MOST_DIGITS = 9  # of a device's number: Python refuses to read thousands of them


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" (a GPU if there is one) | "cpu" | "cuda" | "cuda:N". FastKVError for any other, or one not there."""
    if not isinstance(device, (str, torch.device)):
        raise _unknown(device)
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = str(device).partition(":")
    numbered = index.isascii() and index.isdecimal()  # isdecimal alone takes the digits of every script
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not numbered)):
        raise _unknown(str(device))
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(index or 0) if len(index) <= _MOST_DIGITS else count
    if number >= count:
        raise FastKVError(
            f"device {brief(str(device))} is not there: torch sees {count} CUDA devices; use cpu or auto",
            setting="device",
        )
    return torch.device("cuda", number)


def resolve_rank_device(device: str | torch.device) -> torch.device:
    """The same for a process that torchrun has started: of the GPUs of its host the one with its own number."""
    found = resolve_device(device)
    if found.type == "cpu":
        return found
    if ":" in str(device):
        raise FastKVError(f"each rank has a GPU of its own: take device cuda, not {device}", setting="device")
    count, wanted = torch.cuda.device_count(), rank_device()
    if wanted.index >= count:
        raise FastKVError(f"torchrun has started more than {count} processes here, and torch sees {count} GPUs")
    return wanted


def _unknown(device: object) -> FastKVError:
    return FastKVError(f"device must be auto, cpu, cuda or cuda:N, not {brief(device)}", setting="device")


def resolve_dtype(dtype: str, stored: str, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype, but float32 for float64, and on a CPU that computes in that faster."""
    check_choice("dtype", dtype, ("auto", *DTYPES))
    stored = "float32" if stored == "float64" else stored
    if dtype == "auto":
        dtype = faster_dtype(stored, _cpu_computes(stored)) if device.type == "cpu" else stored
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _cpu_computes(dtype: str) -> bool:
    """Whether this CPU multiplies in `dtype` without converting each value to float32 first."""
    if dtype == "float32":
        return True
    probe = {"bfloat16": "_is_avx512_bf16_supported", "float16": "_is_amx_fp16_supported"}[dtype]
    supported = getattr(torch.cpu, probe, None)  # absent in older or other builds of torch
    return supported is not None and bool(supported())
