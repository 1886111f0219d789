"""What a request gives back: pieces while it runs, an Output at its end, and its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkv.engine.speculation.figures import Speculated

# Metrics.attention_kept below which an answer is likely to be wrong: benchmarks/results/2026-11-27-ablation.md.
LOW_ATTENTION = 0.85


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that it completes ("" while a character or a stop string may be under way)."""

    text: str
    token_id: int


@dataclass(frozen=True)
class Metrics:
    """The figures of one request. Times in seconds, sizes in bytes; an entry is one token's K and V in one KV head.

    ttft_s: from the call to the first token; in a list of prompts that includes the waiting for a place.
    decode_tokens_per_s: (new_tokens - 1) / the time after the first token, None for a single token. kv_tokens: prompt
    tokens that a layer keeps (the mean over layers, rounded).
    kv_entries and kv_full_entries: prompt entries kept, and what a full cache keeps. kv_bytes: the slots for K and V,
    room for max_tokens included, and the index of the keys where steps read few; kv_full_bytes: those of a full cache.
    tsp_tokens: prompt tokens that reach the last layer; layer_tokens: that each layer sees. peak_bytes: on a GPU the
    most memory allocated during the request, on a CPU the most resident memory of the whole process meanwhile (where
    the system cannot begin anew: so far); None where the system does not say.
    attention_kept: the share of the attention mass that all layers keep together, in [0, 1], which tells how far the
    answer can be trusted; layer_attention: that of each layer, what was dropped before it counted as dropped. None
    where that was not measured (cache/mass.py).
    reused_tokens: tokens whose entries were there already: what a session held before the prompt; or what the prompt
    begins with like an earlier one, of the same list or in the `prefix_cache`. Of these, prompt_tokens counts the
    second; kv_tokens, kv_entries and kv_full_entries count both.
    speculation: what drafting tokens has brought, None where none were; kv_bytes are then those of the cache that
    decides, without the draft's.
    layer_entries: kv_entries of each layer, which differ where scores say how many a layer keeps.
    read_bytes: of K and V, and of the index that chooses among them, which a decode step reads in all layers, the mean
    over the steps so far. None where there was none, with a decode_budget that has dropped entries, a kv_dtype or
    speculation. What a layer
    with a sliding window leaves out counts as read, unless the policy reads few.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None
    kv_tokens: int
    kv_entries: int
    kv_full_entries: int
    kv_bytes: int
    kv_full_bytes: int
    tsp_tokens: int
    layer_tokens: tuple[int, ...]
    peak_bytes: int | None
    attention_kept: float | None = None
    layer_attention: tuple[float | None, ...] = ()
    reused_tokens: int = 0
    speculation: Speculated | None = None
    layer_entries: tuple[int, ...] = ()
    read_bytes: int | None = None


@dataclass(frozen=True)
class RunInfo:
    """What ran a request.

    policy: its name. settings: those of the policy, with defaults that depend on the model worked out. device and
    dtype: as torch names them ("cuda:0", "bfloat16"). kv_dtype: of packed entries, None where they are in `dtype`.
    first_pass_layer: where a first pass chose the tokens that the
    model then read anew, None where there was none. decode_budget: entries that each KV head was to hold at most while
    the answer grew; None: it kept all. shared_layers: (reader, source) of each layer that read another one's entries.
    ranks: processes that held the model together; entries and bytes are then those of one of them.
    offloaded_layers: how many of the first ones read the prompt by host memory.
    """

    policy: str
    settings: dict[str, Any]
    device: str
    dtype: str
    first_pass_layer: int | None = None
    decode_budget: int | None = None
    kv_dtype: str | None = None
    shared_layers: tuple[tuple[int, int], ...] = ()
    ranks: int = 1
    offloaded_layers: int = 0


@dataclass(frozen=True)
class Output:
    """A finished request.

    text has neither the EOS nor the stop string that ended it; token_ids has every token generated.
    finish_reason: "stop" (EOS or stop string) or "length"; "interrupted" for a stream that was left before its end.
    run: the policy, device and dtype of this very request.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: Metrics
    run: RunInfo
