"""Compiled code in the user's cache folder: shared libraries, each with a file that says what it holds for."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from fastkv.kernels.size_conditions import Sizes
from fastkv.storage import cache_folder, write_atomically

FORMAT = 1  # of what is kept; rises when the same recording is compiled to something else

_log = logging.getLogger(__name__)


def keep(kind: str, library: Path, sizes: Sizes) -> None:
    """Put a library into the cache folder, then what it holds for: without the second file, the first is not used."""
    content = library.read_bytes()
    told = {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest(), "condition": sizes.condition}
    told["open"] = {str(place): each for place, each in sizes.open.items()}
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(folder / f"{kind}.so", content)
        write_atomically(folder / f"{kind}.json", json.dumps(told, indent=1).encode())
    except (OSError, RuntimeError) as error:  # no folder, no home
        _log.info("compiled code is not kept: %s", error)


def kept(kind: str) -> tuple[Path, Sizes] | None:
    """What an earlier process compiled; None where nothing is, or not what was written."""
    try:
        folder = _folder()
        told = json.loads((folder / f"{kind}.json").read_bytes())
        library = folder / f"{kind}.so"
        if told["format"] != FORMAT or hashlib.sha256(library.read_bytes()).hexdigest() != told["sha256"]:
            return None
        return library, Sizes({int(place): each for place, each in told["open"].items()}, told["condition"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not as written
        return None


def anything_kept() -> bool:
    """Whether some compiled code is there, so that this machine had a compiler once."""
    try:
        return any(_folder().glob("*.json"))
    except (OSError, RuntimeError):
        return False


def _folder() -> Path:
    return cache_folder() / "compiled"
