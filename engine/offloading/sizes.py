"""What a layer of an offloaded prefill (engine/offloading/run.py) takes, in bytes: on the device, and on the host.

A part of footprint.py, made of its formulas; see there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from fastkv.engine.offloading.streamed_attention import LOGITS, MASKED_KEYS

_INDEX = 8  # bytes of an int64: positions and indices
_FLOAT = 4  # bytes of a float32


class Sizes(Protocol):
    """The sizes that tensors are made of, and steps that a layer shares with one on the device."""

    @property
    def batch(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def item(self) -> int: ...
    def values(self, n_tokens: int, width: int) -> int: ...
    def of_heads(self, n_tokens: int, n_heads: int) -> int: ...
    def projecting(self, n_tokens: int, keys_only: bool) -> int: ...
    def querying(self, n_tokens: int) -> int: ...
    def finishing(self, n_tokens: int) -> int: ...
    def packing(self, n_entries: int) -> int: ...


class OffloadedLayer(NamedTuple):
    """buffers, host_buffers: by name. step, host_step: what the largest step makes besides, and lets go."""

    buffers: dict[str, int]
    step: int
    host_buffers: dict[str, int]
    host_step: int


def offloaded_layer(
    sizes: Sizes, chunk: int, seen: int, kept: int, out: int, queries: int, scoring: int, stays: bool
) -> OffloadedLayer:
    """Of a layer that sees `seen` tokens and lets `out` of them go on, whose hidden states then `stay` on the host.

    chunk: tokens on the device at a time. kept: entries that go to the cache. queries: how many of the last ones score
    (0: nothing is scored). scoring: bytes of what the policy makes of them.
    """
    few, count = out < seen or seen == 1, min(chunk, seen)
    heads = 2 * sizes.kv_heads + (0 if few else sizes.heads)
    block = sizes.of_heads(count, 2 * sizes.kv_heads)
    buffers = {
        "chunk": sizes.values(max(count, min(queries, seen)), sizes.hidden),
        "heads": sizes.of_heads(count, heads),
        **dict.fromkeys(("chunk of keys and values", "one block", "other block"), block),
    }
    host = {
        "host hidden": sizes.values(seen, sizes.hidden),
        "host keys and values": sizes.of_heads(seen, 2 * sizes.kv_heads),
    }
    if few:
        host["other host hidden"] = sizes.values(out, sizes.hidden)
        if not stays:
            buffers["hidden"] = sizes.values(out, sizes.hidden)
    last_queries = sizes.of_heads(min(queries, seen), sizes.heads)  # there until the policy has scored
    at_once = min(chunk, out)
    steps = [
        sizes.querying(min(queries, seen)),
        last_queries + sizes.projecting(count, few),
        last_queries + _attending(sizes, at_once, count, few),
        last_queries + _attended(sizes, at_once) + sizes.finishing(at_once),
    ]
    if few:
        steps.append(sizes.querying(at_once))
    compressed = kept < seen
    gathered = 2 * sizes.of_heads(kept, sizes.kv_heads) + sizes.batch * sizes.kv_heads * kept * _INDEX
    steps.append(last_queries + sizes.packing(kept) + (gathered if compressed else 0))
    positions = sizes.batch * seen * _INDEX
    host_step = 0
    if queries:
        scores = sizes.batch * sizes.kv_heads * seen * _FLOAT
        host_step = last_queries + positions + max(scoring, scores + (gathered if compressed else 0))
    return OffloadedLayer(buffers, max(steps), host, host_step)


def _attended(sizes: Sizes, n_queries: int) -> int:
    """What queries attend to so far and log-sum-exps, float32; and the result, where that is another dtype."""
    rows = sizes.batch * sizes.heads * n_queries
    return rows * (sizes.head_dim + 1) * _FLOAT + (sizes.of_heads(n_queries, sizes.heads) if sizes.item < _FLOAT else 0)


def _attending(sizes: Sizes, n_queries: int, n_keys: int, few: bool) -> int:
    """One block of keys: queries in rows, what they find in it; and for keys under a mask logits, and weights."""
    one = sizes.of_heads(n_queries, sizes.heads)
    floats = sizes.batch * sizes.heads * n_queries * sizes.head_dim * _FLOAT
    found = one + floats if sizes.item < _FLOAT else one
    masked = min(sizes.batch * sizes.heads * n_queries * min(n_keys, MASKED_KEYS), LOGITS)
    logits = masked * (_FLOAT + (sizes.item if sizes.item < _FLOAT else 0)) + masked // sizes.heads
    q = one if few else 0  # else it lies in the buffers
    return q + _attended(sizes, n_queries) + one + found + logits
