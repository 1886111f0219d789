"""What figures belong to: the device and the versions. Measures nothing."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fastkv
from fastkv import LLM


def machine(llm: LLM) -> dict[str, Any]:
    """Date, device, dtype and versions, as they go into a result."""
    return {**device_and_versions(llm.device), "dtype": llm.model.precision}


def device_and_versions(device: torch.device) -> dict[str, Any]:
    """The same where there is no model; of a CPU its name and threads."""
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    on_cpu = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else on_cpu,
        "on_gpu": on_gpu,
        "fastkv": fastkv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
