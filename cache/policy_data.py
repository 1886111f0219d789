"""A policy as plain data, as a file keeps it, and back. Data never names a class that is not in the catalogue."""

from __future__ import annotations

import json
from typing import Any

from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import Policy
from fastkv.cache.setting import settings_of
from fastkv.errors import FastKVError, brief

_FILE = "FILE"  # the metavar of a setting that a file may give; its value in data is always what the file said


def policy_data(policy: Policy) -> dict[str, Any]:
    """The policy's name and settings, for JSON. Raises FastKVError for a class that is not in the catalogue."""
    own = type(policy)
    data = {"name": policy.name, "settings": {name: getattr(policy, name) for name in settings_of(own)}}
    try:
        if policy_of(json.loads(json.dumps(data))) == policy:  # which one of another class is not
            return data
    except (TypeError, ValueError):
        pass
    raise FastKVError(
        f"policy {own.__name__} cannot be kept in a file: only those of fastkv itself can ({', '.join(POLICIES)})",
        setting="policy",
    )


def policy_of(data: Any) -> Policy:
    """The policy that `policy_data` told of. Raises FastKVError for what is none, or no longer."""
    name, settings = (data.get("name"), data.get("settings")) if isinstance(data, dict) else (None, None)
    if not isinstance(name, str) or name not in POLICIES or not isinstance(settings, dict):
        raise FastKVError(f"{brief(name)} is no policy of this version of fastkv")
    known = settings_of(POLICIES[name])
    for setting, value in settings.items():
        if setting not in known or (known[setting].metavar == _FILE and isinstance(value, str)):
            raise FastKVError(f"{brief(setting)} is no setting of policy {name}, or has no such value")
    return POLICIES[name](**settings)
