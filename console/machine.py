"""What figures belong to: the model's files, the device and the versions. Measures nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from fastkv import __version__
from fastkv.engine.llm import LLM
from fastkv.models.files import check_ordinary

_SAMPLE = 1 << 16  # bytes of a large file that are read, at each of its ends


def machine(llm: LLM) -> dict[str, Any]:
    """Device, dtype and versions, as they go into a result."""
    return {
        "device": torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else str(llm.device),
        "dtype": llm.model.precision,
        **({} if llm.kv_dtype is None else {"kv_dtype": llm.kv_dtype}),
        "fastkv": __version__,
        "torch": torch.__version__,
    }


def fingerprint(folder: Path) -> str:
    """A checksum of the names, sizes and ends of a model's files: whether the folder still holds the same model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".jinja", ".model", ".safetensors"):
            continue
        check_ordinary(path)
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > 2 * _SAMPLE:
                file.seek(-_SAMPLE, 2)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
