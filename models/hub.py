"""A model given by name: a local folder, or a Hugging Face hub id of which only the needed files are downloaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fastkv.errors import FastKVError

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
    "chat_template.jinja",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`; a hub id is downloaded first (or found in the hub's cache when offline).

    Raises FastKVError if there is no such folder, no such model, or no way to reach the hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise FastKVError(f"revision {revision!r} is for hub ids, but {folder} is a folder", setting="revision")
        return folder
    if folder.exists():
        raise FastKVError(f"{folder}: is a file; --model takes the folder that holds config.json")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise FastKVError(f"{folder}: no such folder; --model takes a folder or a hub id like org/name")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(NEEDED)))
    except GatedRepoError:
        raise FastKVError(f"{model}: access is restricted; accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise FastKVError(f"{model}: has no revision {revision!r}", setting="revision") from None
    except RepositoryNotFoundError:
        raise FastKVError(f"{model}: no such folder here, and no such model on the hub (or it is private)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise FastKVError(
            f"{model}: no such folder here, not in the hub's cache, and the hub cannot be reached (offline?); "
            "give a local folder, or go online once"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FastKVError(f"{model}: cannot be downloaded ({reason})") from None
