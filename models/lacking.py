"""What to say of a model folder in which a file is missing: what is there instead, and how to get the file."""

from __future__ import annotations

import os
from pathlib import Path

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LAYOUT = "--model takes a folder in the Hugging Face layout (with config.json)"
# What marks a folder that is something else, and what that is.
_OTHERS = (
    ("adapter_config.json", "an adapter (LoRA), which is no model by itself: merge it into its model first"),
    ("*.gguf", "a GGUF model, which is not read: take the safetensors weights of the same model"),
    ("params.json", "the model in its authors' own layout: take the one in the Hugging Face layout"),
    ("model_index.json", "a pipeline of several models: name the folder of the text model"),
)


def gone(path: Path, what: str = "file") -> str | None:
    """What to say of a link to a file (or folder) that is gone; None where `path` is no such link."""
    if not os.path.lexists(path) or path.exists():
        return None
    if is_snapshot(path.parent):
        return f"{path}: the hub's cache has lost the file that this links to; {_fetch_again(path.parent)}"
    return f"{path}: a link to a {what} that is not there ({os.readlink(path)})"


def no_file(path: Path) -> str:
    """What to say of a file that is not there and has to be."""
    if said := gone(path):
        return said
    return no_config(path.parent) if path.name == "config.json" else f"{path}: no such file"


def no_config(folder: Path) -> str:
    """What to say where there is no config.json."""
    said = f"{folder / 'config.json'}: no such file"
    for pattern, what in _OTHERS:
        if any(folder.glob(pattern)):
            return f"{said}; this is {what}"
    if is_snapshot(folder):
        return (
            f"{said}; either the download is incomplete ({_fetch_again(folder)}), or the model is not in the Hugging "
            "Face layout"
        )
    if inner := sorted(path.parent.name for path in folder.glob("*/config.json")):
        return f"{said}; there is one in {inner[0]}: name that folder"
    if not any(folder.glob("*")):
        return f"{said}; the folder is empty"
    return f"{said}; {_LAYOUT}"


def no_weights(folder: Path, single: str, index: str) -> str:
    """What to say where there are neither weights in one file nor an index of several."""
    for name in (single, index):
        if said := gone(folder / name):
            return said
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: holds only pickled weights ({pickled[0]}), which are never opened because a pickle can run "
            "code; convert them to safetensors first"
        )
    said = f"{folder}: no {single} and no {index}"
    if is_snapshot(folder):
        return (
            f"{said}; either the download is incomplete ({_fetch_again(folder)}), or the model has no safetensors "
            "weights on the hub"
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    shard = any(name.startswith("model-") for name in other)
    if shard:
        return f"{said}; without the index {other[0]} is not read: fetch it, too"
    return f"{said}; {other[0]} is not read under that name" if other else said


def no_shard(file: Path, index: str) -> str:
    """What to say where a shard that the index names is not there."""
    how = _fetch_again(file.parent) if is_snapshot(file.parent) else "is the download complete?"
    return gone(file) or f"{file}: no such file, though {index} names it; {how}"


def incomplete(snapshot: Path) -> str:
    """What to say of a snapshot of which the hub's library knows that files are missing."""
    lost = next((said for path in sorted(snapshot.iterdir()) if (said := gone(path))), None)
    return lost or f"{snapshot}: the download is incomplete; {_fetch_again(snapshot)}"


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a revision of a model in the hub's cache."""
    snapshots = folder.absolute().parent
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def _fetch_again(folder: Path) -> str:
    """How to complete a snapshot: by its name, and by its revision where that is not the usual one."""
    home, revision = folder.absolute().parents[1], folder.absolute().name
    main = home / "refs" / "main"
    usual = main.is_file() and main.read_text().strip() == revision
    model = home.name.removeprefix("models--").replace("--", "/", 1)
    return f"run once with --model {model}{'' if usual else f' --revision {revision}'} while the hub can be reached"
