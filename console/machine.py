"""What figures belong to: the model's files (`fingerprint`), the device and the versions. Measures nothing."""

from __future__ import annotations

from typing import Any

import torch

from fastkv import __version__
from fastkv.engine.llm import LLM
from fastkv.models.files import fingerprint as fingerprint


def machine(llm: LLM) -> dict[str, Any]:
    """Device, dtype and versions, as they go into a result."""
    return {
        "device": torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else str(llm.device),
        "dtype": llm.model.precision,
        **({} if llm.kv_dtype is None else {"kv_dtype": llm.kv_dtype}),
        **({"shared_layers": list(llm.share_layers.items())} if llm.share_layers else {}),
        "fastkv": __version__,
        "torch": torch.__version__,
    }
