"""Which layers read the entries of an earlier one in place of their own (KVSharer, arXiv 2410.18517).

`fastkv-eval share-layers` finds the pairs for a model, and writes the file that is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError, brief, cut
from fastkv.storage import is_odd

KIND = "fastkv-share-layers"
Sources = tuple[int, ...]  # of each layer, the one whose entries it reads: itself, or an earlier one
_HOLDS = "kind, files, n_layers and pairs; fastkv-eval share-layers writes one"


@dataclass(frozen=True)
class LayerMap:
    """pairs: (reader, source), by rising reader. A source comes before its readers, and reads no other layer.

    files: the fingerprint of the model that it was made for (None: it was given as a mapping, for any model).
    n_layers: of that model. name: how messages call it.
    """

    pairs: tuple[tuple[int, int], ...]
    files: str | None = None
    n_layers: int | None = None
    name: str = "share_layers"

    def sources(self, n_layers: int) -> Sources:
        """The source of each layer of a model. Raises FastKVError for a model without such layers."""
        if self.n_layers not in (None, n_layers):
            raise _wrong(f"{self.name}: was made for a model of {self.n_layers} layers, but this one has {n_layers}")
        largest = max((reader for reader, _ in self.pairs), default=0)
        if largest >= n_layers:
            raise _wrong(f"{self.name}: layer {largest} is none of this model, whose layers are 0 to {n_layers - 1}")
        readers = dict(self.pairs)
        return tuple(readers.get(layer, layer) for layer in range(n_layers))

    def check_model(self, files: str) -> None:
        """FastKVError unless it was made for the model with this fingerprint, or for any."""
        if self.files not in (None, files):
            raise _wrong(
                f"{self.name}: was made for another model (the checksum of its files is {self.files}, that of this "
                f"model's is {files}); run fastkv-eval share-layers with this model"
            )


def read_map(source: str | PathLike[str] | Mapping[int, int]) -> LayerMap:
    """The map of a file of `fastkv-eval share-layers`, or of {reader: source}.

    Raises FastKVError for a file that cannot be read or is none, and for pairs that are out of order.
    """
    if isinstance(source, Mapping):
        return LayerMap(_checked("share_layers", list(source.items())))
    if not isinstance(source, (str, PathLike)):
        raise _wrong(f"share_layers must be a file or a mapping of layers, not {brief(source)}")
    name = cut(str(fspath(source)), 200)
    content = _object(Path(source), name)
    if content.get("kind") != KIND:
        raise _wrong(f"{name}: is of the kind {brief(content.get('kind'))}, not {KIND!r}")
    files, n_layers, pairs = (content.get(key) for key in ("files", "n_layers", "pairs"))
    if not isinstance(files, str) or not _is_layer(n_layers) or not isinstance(pairs, list):
        raise _wrong(f"{name}: must be a JSON object with {_HOLDS}")
    if not all(isinstance(pair, dict) and {"reader", "source"} <= set(pair) for pair in pairs):
        raise _wrong(f"{name}: each of its pairs must be an object with reader and source")
    checked = _checked(name, [(pair["reader"], pair["source"]) for pair in pairs])
    return LayerMap(checked, files, n_layers, name)


def _object(path: Path, name: str) -> dict[str, Any]:
    if is_odd(path):
        raise _wrong(f"{name}: cannot be read, for it is no ordinary file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _wrong(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or a number with thousands of digits
        content = None
    if not isinstance(content, dict):
        raise _wrong(f"{name}: is no JSON object with {_HOLDS}")
    return content


def _checked(name: str, pairs: list[tuple[Any, Any]]) -> tuple[tuple[int, int], ...]:
    """The pairs by rising reader. Raises FastKVError unless each source comes before its reader and reads no other."""
    wrong = next((layer for pair in pairs for layer in pair if not _is_layer(layer)), None)
    if wrong is not None or any(None in pair for pair in pairs):
        raise _wrong(f"{name}: a layer must be a whole number of at least 0, not {brief(wrong, 40)}")
    readers: dict[int, int] = {}
    for reader, source in pairs:
        if source >= reader:
            raise _wrong(f"{name}: layer {reader} would read layer {source}, which does not come before it")
        if reader in readers:
            raise _wrong(f"{name}: layer {reader} comes up twice as a reader; it can read one other layer")
        readers[reader] = source
    chained = next((source for source in readers.values() if source in readers), None)
    if chained is not None:
        raise _wrong(
            f"{name}: layer {chained} is to be read, but reads layer {readers[chained]} itself; let its readers read "
            "that one"
        )
    return tuple(sorted(readers.items()))


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(message: str) -> FastKVError:
    return FastKVError(message, setting="share_layers")
