"""What figures belong to: the device and the versions. Measures nothing."""

from __future__ import annotations

import platform
from datetime import date
from typing import Any

import torch

import fastkv
from fastkv import LLM
from fastkv.kernels.calibration import cpu_name


def machine(llm: LLM) -> dict[str, Any]:
    """Date, device, dtype and versions, as they go into a result."""
    return {**device_and_versions(llm.device), "dtype": llm.model.precision}


def device_and_versions(device: torch.device) -> dict[str, Any]:
    """The same where there is no model; of a CPU its name and threads."""
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    on_cpu = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else on_cpu,
        "on_gpu": on_gpu,
        "fastkv": fastkv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
