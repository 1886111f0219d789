"""The flag --share-layers: layers that read an earlier layer's entries. Checked before torch is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastkv.cache.layer_map import read_map
from fastkv.console.parser import flag_of
from fastkv.console.words import counted
from fastkv.errors import FastKVError

_REFUSED = ("context", "cache", "save_cache", "lossless", "speculation", "decode_budget", "kv_dtype", "reuse_prefix")


def check_share_layers(args: argparse.Namespace) -> None:
    """FastKVError for a file that is no map, and for flags of the command that do not go with one."""
    if args.share_layers is None:
        return
    read_map(args.share_layers)
    for other in _REFUSED:
        if getattr(args, other, None):
            raise FastKVError(f"does not go with {flag_of(other)}: leave one of them out", setting="share_layers")


def shared_rows(pairs: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """Which layers read others, as (label, text) rows."""
    if not pairs:
        return []
    told = ", ".join(f"{reader} reads {source}" for reader, source in pairs)
    stores = "stores no entries of its own" if len(pairs) == 1 else "store no entries of their own"
    return [("shared", f"{counted(len(pairs), 'layer')} {stores}: {told}")]
