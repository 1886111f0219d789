"""Compiled code in the user's cache folder: shared libraries, each with a file that says what it holds for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from fastkv.kernels.size_conditions import Sizes
from fastkv.storage import cache_folder, write_atomically

FORMAT = 2  # of what is kept; rises when the same recording is compiled to something else

_log = logging.getLogger(__name__)


def keep(kind: str, library: Path, sizes: Sizes) -> None:
    """Put a library into the cache folder, then what it holds for: without the second file, the first is not used."""
    content = library.read_bytes()
    told = {"open": {str(place): each for place, each in sizes.open.items()}, "condition": sizes.condition}
    about = {"format": FORMAT, "sha256": _digest(content, told), "sizes": told}
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(folder / f"{kind}.so", content, durable=False)
        write_atomically(folder / f"{kind}.json", json.dumps(about, indent=1).encode(), durable=False)
    except (OSError, RuntimeError) as error:  # no folder, no home
        _log.info("compiled code is not kept: %s", error)


def kept(kind: str) -> tuple[Path, Sizes] | None:
    """What an earlier process compiled; None where nothing is, or not what was written."""
    try:
        folder = _folder()
        about = json.loads((folder / f"{kind}.json").read_bytes())
        library, told = folder / f"{kind}.so", about["sizes"]
        if about["format"] != FORMAT or _digest(library.read_bytes(), told) != about["sha256"]:
            return None
        if not _is_ours(folder):
            _log.warning("%s is not used: it belongs to another user, or others can write to it", folder)
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


def _digest(library: bytes, told: object) -> str:
    """Of a library and of the sizes that it holds for, which stand in for checks of the library's own."""
    return hashlib.sha256(json.dumps(told).encode() + library).hexdigest()


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a library there: it is run as it is."""
    about = folder.stat()
    return not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o022)


def _folder() -> Path:
    return cache_folder() / "compiled"
