"""Policy files: a policy and its settings, as `fastkv-eval tune` found them for one model. Imports no torch.

The latest one of each model is remembered in the user's cache folder, under the fingerprint of the model's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Policy
from fastkv.cache.setting import settings_of
from fastkv.console.files import read_json, write_whole
from fastkv.console.policy_text import build_policy
from fastkv.errors import FastKVError, brief
from fastkv.storage import cache_folder

KIND = "fastkv-policy"
TEXTS = ("kind", "date", "files", "policy")
_HOLDS = "kind, date, files, policy and settings; fastkv-eval tune writes one"


@dataclass(frozen=True)
class PolicyFile:
    """What a policy file says. files: the fingerprint of the model that it was made for. date: YYYY-MM-DD.

    remembered: found in the cache folder, not named by the user.
    """

    path: Path
    date: str
    files: str
    policy: str
    settings: dict[str, Any]
    remembered: bool = False

    def build(self, given: Mapping[str, Any]) -> Policy:
        """The policy; each of the `given` settings replaces the file's. Raises FastKVError where one does not fit."""
        return build_policy(self.policy, {**self.settings, **given})

    def check_model(self, files: str) -> None:
        """FastKVError unless the file was made for the model with this fingerprint."""
        if self.files != files:
            raise FastKVError(
                f"{self.path}: was made for another model (the checksum of its files is {self.files}, that of this "
                f"model's is {files}); run fastkv-eval tune with this model, or give --policy fastkv",
                setting=None if self.remembered else "policy_file",
            )

    def blamed(self, error: FastKVError, given: Mapping[str, Any]) -> FastKVError:
        """The same complaint, naming this file where the setting at fault comes from it, not from the `given` ones."""
        if error.setting not in self.settings or error.setting in given:
            return error
        return FastKVError(f"{self.path}: {error}")

    def told(self, given: Mapping[str, Any]) -> str:
        """Where the policy comes from and what it sets, for people."""
        settings = ", ".join(f"{name} {value}" for name, value in {**self.settings, **given}.items())
        source = "for this model" if self.remembered else f"({self.path})"
        return f"on {self.date} {source}: {self.policy}, {settings}; --policy fastkv for the defaults"


def read_policy_file(path: Path, remembered: bool = False) -> PolicyFile:
    """Raises FastKVError, naming the file, where it cannot be read, is no policy file, or says what no policy takes."""
    try:
        content = read_json(path, "policy_file", _HOLDS)
        found = _checked(path, content, remembered)
    except FastKVError as error:
        if remembered:  # nobody named it
            raise FastKVError(f"{error}; delete this file, or give --policy fastkv") from None
        raise FastKVError(str(error), setting="policy_file") from None
    return found


def _checked(path: Path, content: dict[str, Any], remembered: bool) -> PolicyFile:
    for name in TEXTS:
        if not isinstance(content.get(name), str):
            raise FastKVError(f"{path}: has no text under {name!r}; it must be a JSON object with {_HOLDS}")
    policy, settings = content["policy"], content.get("settings")
    if content["kind"] != KIND:
        raise FastKVError(f"{path}: is of the kind {brief(content['kind'])}, not {KIND!r}")
    if policy not in POLICIES:
        raise FastKVError(f"{path}: policy must be one of {', '.join(POLICIES)}, not {brief(policy)}")
    if not isinstance(settings, dict):
        raise FastKVError(f"{path}: has no object under 'settings'; it must be a JSON object with {_HOLDS}")
    unknown = [name for name in settings if name not in settings_of(POLICIES[policy])]
    if unknown:
        raise FastKVError(f"{path}: {brief(unknown[0])} is no setting of policy {policy}")
    try:
        build_policy(policy, settings)
    except FastKVError as error:
        raise FastKVError(f"{path}: {error}") from None
    return PolicyFile(path, content["date"], content["files"], policy, settings, remembered)


def remembers() -> bool:
    """Whether anything is remembered of any model."""
    return (cache_folder() / "policies").is_dir()


def remembered_path(files: str) -> Path:
    """Where the policy of the model with this fingerprint is remembered."""
    return cache_folder() / "policies" / f"{files}.json"


def remembered_policy(files: str) -> PolicyFile | None:
    """What is remembered for the model with this fingerprint. Raises FastKVError where the file is broken."""
    path = remembered_path(files)
    return read_policy_file(path, remembered=True) if path.exists() else None


def write_policy_file(path: Path, content: Mapping[str, Any], setting: str) -> None:
    """Write a policy file whole, or leave the old one. content: what it holds besides its kind."""
    write_whole(path, json.dumps({"kind": KIND, **content}, indent=2, default=str) + "\n", setting)


def remember(content: Mapping[str, Any]) -> Path:
    """Keep a policy file for its model, in place of the one before; where it is. FastKVError where that cannot be."""
    path = remembered_path(content["files"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastKVError(f"{path.parent}: cannot be made ({error.strerror})") from None
    write_policy_file(path, content, "cache")
    return path
