"""Which layers are to read which: KVSharer's search (arXiv 2410.18517). Knows no model.

Pairs are tried from the most distant on: against intuition, layers whose K and V differ most are the ones that can
share, the paper finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastkv.cache.layer_map import Sources


@dataclass(frozen=True)
class Tried:
    """A pair that was tried, after those before it: the reader's and the source's layer, the distance of what they
    store, the mean cosine with the model as it is, and whether it stays."""

    reader: int
    source: int
    distance: float
    cosine: float
    stays: bool


def ranked(distances: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(reader, source) of every two layers, the later one reading, by falling distance; ties by their numbers."""
    pairs = [(reader, source) for reader in range(len(distances)) for source in range(reader)]
    return sorted(pairs, key=lambda pair: -distances[pair[0]][pair[1]])  # stable


def search(
    distances: Sequence[Sequence[float]],
    wanted: int,
    threshold: float,
    cosine: Callable[[Sources], float],
    fits: Callable[[int, int], bool] = lambda reader, source: True,
) -> Iterator[Tried]:
    """Try one pair after another until `wanted` layers read others; a pair stays if the cosine is above `threshold`.

    A layer that reads is read by none, and one that is read reads none. cosine: of the model with these sources. fits:
    whether a reader can make use of a source's entries at all.
    """
    n_layers = len(distances)
    readers: dict[int, int] = {}
    for reader, source in ranked(distances):
        if len(readers) == wanted:
            return
        taken = reader in readers or reader in readers.values() or source in readers
        if taken or not fits(reader, source):
            continue
        sources = {**readers, reader: source}
        found = cosine(tuple(sources.get(layer, layer) for layer in range(n_layers)))
        stays = found > threshold
        if stays:
            readers = sources
        yield Tried(reader, source, distances[reader][source], found, stays)
