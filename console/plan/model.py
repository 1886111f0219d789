"""The shape of a model by a name: a preset, a folder with a config.json, or a hub id of which that is here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from fastkv.engine.device import resolve_dtype
from fastkv.errors import FastKVError
from fastkv.models.checkpoint import INDEX, SINGLE, stored_dtype
from fastkv.models.config import ModelConfig
from fastkv.models.hub import model_folder
from fastkv.models.presets import PRESETS


class Shape(NamedTuple):
    """A model of which no weights are read. folder: its files; None: it is a preset."""

    config: ModelConfig
    folder: Path | None

    @property
    def has_weights(self) -> bool:
        return self.folder is not None and any((self.folder / name).is_file() for name in (SINGLE, INDEX))

    def dtype(self, asked: str, device: torch.device) -> torch.dtype:
        """What --dtype means. Raises FastKVError where "auto" means nothing."""
        stored = self.config.dtype
        if stored is None and self.folder is not None and self.has_weights:
            stored = stored_dtype(self.folder)
        if stored is None and asked == "auto":
            raise FastKVError(f"{self.folder}: config.json does not say the dtype; give one", setting="dtype")
        return resolve_dtype(asked, stored or "float32", device)


def shape_of(model: str, revision: str | None) -> Shape:
    """The shape of a model by its name; a folder of that name wins over a preset. Downloads nothing.

    Raises FastKVError where there is none.
    """
    name = os.path.expanduser(model)
    if model in PRESETS and not os.path.isdir(name):
        if revision is not None:
            raise FastKVError(f"is for hub ids, and {model} is a preset", setting="revision")
        return Shape(PRESETS[model], None)
    if os.path.lexists(name) or model.count("/") != 1:
        if not os.path.lexists(name):
            presets = ", ".join(PRESETS)
            raise FastKVError(f"{model}: no such folder and no preset; presets are {presets}", setting="model")
        folder = model_folder(model, revision)
    else:
        folder = _in_hub_cache(model, revision)
    return Shape(ModelConfig.from_pretrained(folder), folder)


def _in_hub_cache(model: str, revision: str | None) -> Path:
    """The folder of a hub id in the hub's cache, if its config.json is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise FastKVError(
            f"{model}: no such folder, and no config.json of such a hub id is here; a plan downloads nothing: run "
            "fastkv-run with it once, or give a folder with its config.json",
            setting="model",
        )
    return Path(found).parent
