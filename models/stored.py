"""Under which names a checkpoint holds what a config.json asks for, and whether the two belong together.

All of it is read from the header of the files: names, shapes and dtypes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile

from fastkv.errors import FastKVError, brief
from fastkv.models.checkpoint import Checkpoint, is_left_over
from fastkv.models.config import ModelConfig
from fastkv.models.sources import EMBEDDING, HEAD, Source, first_layer, table

_BASE = "model."  # what the tensors of the network without its head begin with
_LAYER_0 = re.compile(r"\blayers\.0\.")


class StoredNames:
    """The names in a checkpoint by the names that a model of `config` gives them.

    A base model's export leaves `model.` out, and some tools write it twice; a tied table may be under either name.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint = checkpoint
        self._stored = set(checkpoint.names)
        self._tables = [table(config, module).name for module in (EMBEDDING, HEAD)]
        self._tied = config.tie_word_embeddings

    def find(self, name: str) -> str | None:
        """The stored name, or None where there is no such tensor."""
        names = self._tables if self._tied and name in self._tables else [name]
        return next((each for one in names for each in _spellings(one) if each in self._stored), None)

    def own(self, name: str) -> str | None:
        """The stored name, the other table's left aside."""
        return next((each for each in _spellings(name) if each in self._stored), None)

    def of(self, sources: Iterable[Source]) -> dict[str, str]:
        """The stored name of every source, all of them checked: none missing, none misshapen, none left over."""
        wanted = {source.name: source.shape for source in sources}
        found = {name: stored for name in wanted if (stored := self.find(name)) is not None}
        known = {*found.values(), *(stored for name in self._tables if self._tied and (stored := self.own(name)))}
        missing = [name for name in wanted if name not in found]
        extra = [name for name in sorted(self._stored - known) if not is_left_over(name)]
        if missing or extra:
            raise FastKVError(f"{self._checkpoint.path}: {_difference(missing, extra, self._stored)}")
        for name, stored in found.items():
            self._checkpoint.check(stored, wanted[name])
        return found


def check_sizes(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """FastKVError unless embedding, first layer and number of layers are stored as config.json says.

    Takes no memory and little time, whatever config.json says; StoredNames.of looks at everything.
    """
    names = StoredNames(checkpoint, config)
    try:
        layer = first_layer(config)
    except RuntimeError:  # torch cannot count so many
        raise FastKVError(f"{checkpoint.path}: config.json asks for larger matrices than any file holds") from None
    found = [(stored, source.shape) for source in layer if (stored := names.find(source.name)) is not None]
    tables = [table(config, module) for module in (EMBEDDING, HEAD)]
    found += [(stored, source.shape) for source in tables if (stored := names.own(source.name)) is not None]
    for stored, shape in found:
        checkpoint.check(stored, shape)
    n_layers = _count_layers(names, layer, config.n_layers)
    if 0 < n_layers < config.n_layers:
        raise FastKVError(
            f"{checkpoint.path}: has the tensors of {n_layers} layer{'s' * (n_layers > 1)}, but config.json says "
            f"num_hidden_layers {config.n_layers}; the two do not belong together, or the download is not complete"
        )


def _count_layers(names: StoredNames, first: list[Source], most: int) -> int:
    """Layers from the first on of which any tensor is stored; up to `most`."""

    def is_stored(layer: int) -> bool:
        return any(names.find(_LAYER_0.sub(f"layers.{layer}.", source.name)) for source in first)

    return sum(1 for _ in takewhile(is_stored, range(most)))


def _spellings(name: str) -> tuple[str, ...]:
    return name, _BASE + name, name.removeprefix(_BASE)


def _difference(missing: list[str], extra: list[str], stored: set[str]) -> str:
    if not missing:
        return f"unexpected {_some(extra)}; the weights do not belong to this config.json"
    if missing == ["lm_head.weight"] and not extra:
        return (
            "missing tensor lm_head.weight, which gives the next token: this is a base model without its head; take "
            "the model for text generation (if its head is the embedding, config.json says tie_word_embeddings true)"
        )
    if not extra:
        return f"missing {_some(missing)}; is the download complete?"
    twin = _twin(missing[0], extra)
    said = f"missing {_some(missing)}, and unexpected {_some([twin, *extra[1:]] if twin else extra)}"
    if twin is None:
        return f"{said}; the weights do not belong to this config.json"
    prefix = next(twin.removesuffix(each) for each in _spellings(missing[0]) if twin.endswith(each))
    if all(name.startswith(prefix) for name in stored):
        return f"{said}; every name begins with {brief(prefix)}: save the model without what it was wrapped in"
    return f"{said}; the model is a part of another one, under {brief(prefix)}: save that part alone"


def _twin(name: str, extra: list[str]) -> str | None:
    """The tensor with a missing one's name and something in front of it."""
    endings = tuple(f".{each}" for each in _spellings(name))
    return next((each for each in extra if each.endswith(endings)), None)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]}{more}"
