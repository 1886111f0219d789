"""A model given by name: a local folder, or a Hugging Face hub id of which only the needed files are downloaded."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkv.errors import FastKVError
from fastkv.models.lacking import gone, incomplete

# Weights in one file or in numbered shards; never pickles, never code, never the same weights twice in another layout.
NEEDED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`; a hub id is downloaded first (or found in the hub's cache when offline).

    Raises FastKVError if there is no such folder, no such model, or no way to reach the hub.
    """
    name = os.path.expanduser(model)
    folder = Path(name)
    if name and os.path.isdir(name):
        if revision is not None:
            raise FastKVError(f"revision {revision!r} is for hub ids, but {model} is a folder", setting="revision")
        return folder
    if os.path.isfile(name):
        raise FastKVError(f"{model}: is a file; --model takes the folder that holds config.json")
    if os.path.lexists(name):
        raise FastKVError(gone(folder, "folder") or f"{model}: is no folder; --model takes one that holds config.json")
    if isinstance(model, Path) or not _is_hub_id(model):
        raise FastKVError(f"{model}: no such folder; --model takes a folder or a hub id like org/name")
    return _download(model, revision)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with _quiet_hub():
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(NEEDED)))
    except GatedRepoError:
        raise FastKVError(f"{model}: access is restricted; accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise FastKVError(f"{model}: has no revision {revision!r}", setting="revision") from None
    except RepositoryNotFoundError:
        raise FastKVError(f"{model}: no such folder here, and no such model on the hub (or it is private)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # Where the hub's library knows what should be there, it tells of a part of it.
        part = getattr(error, "snapshot_path", None)
        raise FastKVError(_not_in_cache(model) if part is None else incomplete(Path(part))) from None
    except Exception as error:  # whatever can happen on the way: the hub, the network, the disk
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FastKVError(f"{model}: cannot be downloaded ({reason}); try again, or give a local folder") from None
    if not folder.is_dir():  # nothing was fetched
        raise FastKVError(
            f"{model}: has neither a config.json nor safetensors weights on the hub: not a model in the Hugging Face "
            "layout"
        )
    return folder


def _not_in_cache(model: str) -> str:
    return (
        f"{model}: no such folder here, not (wholly) in the hub's cache, and the hub cannot be reached (offline?); "
        "give a local folder, or go online once"
    )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub library's remarks out of the command's output: what fails is said in one line of our own."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
