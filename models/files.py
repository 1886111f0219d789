"""Reading the files of a model folder, whatever they turn out to be."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastkv.errors import FastKVError
from fastkv.storage import is_odd

_SAMPLE = 1 << 16  # bytes of a large file that are read, at each of its ends


def check_ordinary(path: Path) -> None:
    """FastKVError for what is there and is no ordinary file."""
    if is_odd(path):
        raise FastKVError(f"{path}: cannot be read, for it is no ordinary file; fetch it again")


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
