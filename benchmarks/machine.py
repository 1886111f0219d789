"""What figures belong to: the device and the versions. Measures nothing."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastkv import LLM
from fastkv.console import machine as shared


def machine(llm: LLM) -> dict[str, Any]:
    """Date, device, dtype and versions, as they go into a result; of a CPU its name and threads."""
    about = {"date": date.today().isoformat(), **shared.machine(llm), "on_gpu": llm.device.type == "cuda"}
    if not about["on_gpu"]:
        threads = torch.get_num_threads()
        about["device"] = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {**about, "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
