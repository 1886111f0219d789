"""RequestPlan: what a request will do and take, worked out once when it is accepted, and read by everything after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastkv.cache.bounded import BoundedCache
from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.layer_map import Sources
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policies.full import FullKV
from fastkv.cache.policy import FirstPass, LayerPlan, Policy, drops_tokens, plan_layers
from fastkv.cache.pool import KVPool, bytes_of, round_up
from fastkv.cache.quantised_layouts import quantised
from fastkv.cache.reader import Index, IndexSizes, Reader
from fastkv.engine.probe import Encode, ProbePlan, plan_probe
from fastkv.engine.shared_layers import held_at_most
from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig


class Past(Protocol):
    """What a sequence that continues already has: a cache (cache/kv_cache.py), or a snapshot of one."""

    @property
    def position(self) -> int:
        """The next token's."""

    @property
    def whole_from(self) -> int:
        """From here on every layer holds every token."""

    @property
    def layout(self) -> type[KVLayer]:
        """How its entries are stored."""

    @property
    def is_even(self) -> bool:
        """Whether the heads of each layer have the same number of entries."""

    def count(self, layer: int) -> int:
        """Entries of the longest head of a layer."""

    def mean(self, layer: int) -> int:
        """Entries of a head of a layer on average, rounded up."""


@dataclass(frozen=True)
class Offload:
    """How a prefill goes by host memory (engine/offloading): its first `layers`, with `chunk` tokens on the device.

    The last of these layers propagates some of its tokens only, or is the last of all.
    """

    layers: int
    chunk: int


@dataclass(frozen=True)
class RequestPlan:
    """The sizes of a prefill and of what comes after it, for each sequence.

    n_tokens: new tokens. start: the position of the first one. past: entries that each layer already holds (0 where a
    sequence begins). layers: what each layer sees of the new tokens, keeps in all, and propagates. compresses: whether
    the policy chooses anything; else every layer keeps every new token. max_tokens: the answer's, for which there is
    room. position_limit: positions that the sequence may take. lookahead: tokens that are drafted when the layers are
    done, and forgotten; fewer than the policy says where the positions end, 0 where no layer drops an entry. probe: how
    the prompt is repeated before its layers choose (None: not at all). capacities: entries of each layer's KV heads.
    layout, shape: how they are stored. decode_budget: what bounds the entries while the answer grows (None: nothing).
    shared: of each layer the one whose entries it reads, itself or an earlier one (cache/layer_map.py); () where none
    reads another. offload: how it goes by host memory (None: it does not).
    """

    policy: Policy
    n_tokens: int
    start: int
    past: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    first_pass: FirstPass | None
    compresses: bool
    max_tokens: int
    position_limit: int
    lookahead: int
    probe: ProbePlan | None
    capacities: tuple[int, ...]
    layout: type[KVLayer]
    shape: EntryShape
    decode_budget: DecodeBudget | None = None
    shared: Sources = ()
    offload: Offload | None = None

    @property
    def evicts(self) -> DecodeBudget | None:
        """The decode_budget, if the answer may become long enough for it to drop anything."""
        budget = self.decode_budget
        if budget is None:
            return None
        return budget if self.max_tokens > budget.steps(max(self.longest)) else None

    @property
    def eager(self) -> str:
        """What its steps have, in words, that neither a graph nor compiled attention can follow; empty: nothing."""
        if self.evicts is not None:
            return "a decode_budget"
        if self.shared:
            return "shared layers"
        return f"policy {self.policy.name}, which chooses what a step reads," if any(self.reads_few) else ""

    @property
    def reads_few(self) -> tuple[bool, ...]:
        """Of each layer, whether a step may read fewer than all entries, before the answer has its full length."""
        end = self.start + self.n_tokens + self.max_tokens
        kept = (layer.kept + self.max_tokens for layer in self.layers)
        return tuple(self.policy.reads_few(index, count, end) for index, count in enumerate(kept))

    @property
    def index_nbytes(self) -> int:
        """Bytes of what chooses the entries that the steps of one sequence read."""
        return sum(held for held, _ in self.index_bytes)

    @property
    def index_bytes(self) -> list[tuple[int, int]]:
        """Of each layer that has an index, what Policy.index_bytes says, for one sequence."""
        sizes = (self.index_sizes(layer.kept, self.max_tokens) for layer in self.layers)
        pairs = enumerate(zip(self.reads_few, sizes, strict=True))
        return [self.policy.index_bytes(layer, each) for layer, (few, each) in pairs if few]

    def index_sizes(self, n_entries: int, room: int, batch: int = 1) -> IndexSizes:
        """Of the index of a layer that has so many entries of each head, and room for more."""
        budget = self.policy.read_budget(self.start + self.n_tokens)
        keys = (batch, self.shape.n_kv_heads, self.shape.head_dim, self.shape.dtype)
        return IndexSizes(*keys, n_entries, n_entries + room, budget)

    def reader(self, cache: KVCache) -> Reader | None:
        """What chooses the entries that the steps of a cache read, which a prefill has filled; None: they read all."""
        reads_few = self.reads_few
        if not any(reads_few):
            return None
        indices: list[Index | None] = []
        for layer, few in enumerate(reads_few):
            sizes = self.index_sizes(cache.count(layer), cache.room, cache.batch)
            indices.append(self.policy.index(layer, sizes, cache.pool.device) if few else None)
        entry_bytes = 2 * self.shape.head_dim * self.shape.dtype.itemsize
        reader = Reader(indices, self.policy.read_budget, entry_bytes)
        for layer, storage in enumerate(cache.layers):
            reader.prepare(layer, storage, cache.slots)
        return reader

    @property
    def is_exact(self) -> bool:
        """Whether the cache holds all that the layers computed, as it was."""
        return not self.compresses and self.layout.kv_dtype is None and not self.shared

    @property
    def longest(self) -> list[int]:
        """Entries of each layer's longest head after the prefill, at most: one may keep all that its layer saw."""
        pairs = zip(self.past, self.layers, strict=True)
        return [before + layer.seen if self.layout.per_head else layer.kept for before, layer in pairs]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache of one sequence."""
        return bytes_of(self.layout, self.capacities, self.shape)

    @property
    def full_nbytes(self) -> int:
        """Bytes of a full cache for the same sequence."""
        capacity = round_up(self.start + self.n_tokens + self.max_tokens)
        return bytes_of(DenseLayer, [capacity] * len(self.layers), self.shape)

    @property
    def held_nbytes(self) -> int:
        """Bytes of K and V that one sequence holds until its layers have chosen: of all they saw, and of what the model
        writes or repeats meanwhile; or of layers, until those that read them have run."""
        if self.shared:
            held = held_at_most(self.layers, self.shared) if self.copies_shared else 0
            return bytes_of(DenseLayer, [held], self.shape)
        if not (self.lookahead or (self.policy.over_layers and self.compresses)):
            return 0
        seen = [before + layer.seen for before, layer in zip(self.past, self.layers, strict=True)]
        return bytes_of(DenseLayer, [count + self._extra for count in seen], self.shape)

    @property
    def copies_shared(self) -> bool:
        """Whether a prefill copies K and V for the layers that read another's, instead of reading them in the cache."""
        return bool(self.shared) and (self.compresses or self.policy.per_head)

    @property
    def decides_online(self) -> bool:
        """Whether it shows only during the prefill after which layer tokens are dropped: at the latest where `layers`
        says."""
        reduces = any(layer.propagated is not None for layer in self.layers)
        return reduces and self.policy.online_selector(len(self.layers), self.n_tokens) is not None

    @property
    def positions(self) -> int:
        """Positions that prompt and answer (or draft, or probe) take at most, from those of this prefill on."""
        return self.layers[0].seen + max(self.max_tokens, self._extra)

    @property
    def _extra(self) -> int:
        """Tokens after the prompt that are forgotten again."""
        return max(self.lookahead, 0 if self.probe is None else self.probe.longest)

    def cache_in(self, pool: KVPool, slots: range) -> KVCache:
        """An empty cache for this request in these slots of a pool."""
        budget = self.evicts
        if budget is not None:
            first = budget.steps(max(self.longest))
            return BoundedCache(pool, slots, self.max_tokens, self.position_limit, budget, first)
        return KVCache(pool, slots, self.max_tokens, self.position_limit)

    def new_cache(self, batch: int, device: torch.device) -> KVCache:
        """An empty cache for `batch` sequences, in memory of its own."""
        pool = KVPool(self.layout, self.capacities, batch, self.shape, device, self.shared)
        return self.cache_in(pool, pool.take_all())


def plan_request(
    config: ModelConfig,
    policy: Policy,
    n_tokens: int,
    max_tokens: int,
    dtype: torch.dtype,
    limit: int,
    cache: Past | None = None,
    encode: Encode = lambda text: (),
    decode_budget: DecodeBudget | None = None,
    reduces: bool = True,
    kv_dtype: str | None = None,
    shared: Sources = (),
) -> RequestPlan:
    """The plan of a prefill of `n_tokens`, from the beginning or from what `cache` holds.

    encode: makes token ids of what a policy tells the model (Policy.probe); as it stands, for a model without a
    tokenizer, there are none. reduces: False lets every layer see every token, whatever the policy propagates, and keep
    of these what its budget says. kv_dtype: of the entries of a sequence that begins, "int8" or "int4" (None: the
    model's). shared: see RequestPlan. Raises FastKVError for one that does not go with the rest.

    See `chooses_again` for which sequences that continue are compressed again. Of the others the earlier entries stay,
    and the new tokens are kept whole.
    """
    n_layers = config.n_layers
    shape = EntryShape(config.n_kv_heads, config.head_dim, dtype)
    past = tuple(0 if cache is None else cache.count(layer) for layer in range(n_layers))
    if not reduces:
        assert cache is None, "of a sequence that begins"
        layers, first_pass = [_without_reduction(policy, layer, n_layers, n_tokens) for layer in range(n_layers)], None
    elif cache is None:
        layers, first_pass = plan_layers(policy, n_layers, n_tokens), policy.first_pass(n_layers, n_tokens)
    elif chooses_again(policy, n_layers, n_tokens, cache):
        layers, first_pass = _layers_continued(policy, past, n_tokens, cache.position + n_tokens), None
    else:
        layers, first_pass = [LayerPlan(n_tokens, before + n_tokens, None) for before in past], None
    seen_at_most = [before + layers[0].seen for before in past]
    compresses = first_pass is not None or any(
        plan.least < most or plan.propagated is not None for plan, most in zip(layers, seen_at_most, strict=True)
    )
    layout = _layout(policy, compresses, kv_dtype) if cache is None else cache.layout
    if decode_budget is not None and layout.kv_dtype is not None:
        raise FastKVError(
            f"decode_budget drops entries again, which are {layout.kv_dtype} here and packed for good: leave one of "
            "the two out",
            setting="kv_dtype",
        )
    drops = any(plan.least < most for plan, most in zip(layers, seen_at_most, strict=True))
    end = n_tokens + (0 if cache is None else cache.position)
    lookahead = max(0, min(policy.lookahead, limit - end)) if drops else 0
    probe = plan_probe(policy.probe, policy.name, n_tokens, limit, encode) if drops and policy.probe else None
    kept = [plan.kept for plan in layers]
    if cache is not None and layout.per_head:  # a head's memory is not its own: what counts is all of them together
        kept = [cache.mean(layer) + n_tokens for layer in range(n_layers)]
    elif layout.per_head:  # those of one rank may win what all ranks' heads have together
        kept = [min(plan.kept * config.n_ranks, plan.seen) for plan in layers]
    own = [not shared or shared[layer] == layer for layer in range(n_layers)]
    capacities = tuple(round_up(count + max_tokens) * mine for count, mine in zip(kept, own, strict=True))
    plan = RequestPlan(
        policy,
        n_tokens,
        0 if cache is None else cache.position,
        past,
        tuple(layers),
        first_pass,
        compresses,
        max_tokens,
        limit,
        lookahead,
        probe,
        capacities,
        layout,
        shape,
        decode_budget,
        shared,
    )
    if shared:
        _check_shared(plan, cache)
    if any(plan.reads_few):
        _check_reads_few(plan, cache)
    return plan if plan.evicts is None else dataclasses.replace(plan, capacities=_bounded_capacities(plan, plan.evicts))


def _check_reads_few(plan: RequestPlan, cache: Past | None) -> None:
    """FastKVError for what does not go with steps that read few of the entries."""
    if plan.decode_budget is not None:
        raise FastKVError(
            f"decode_budget does not go with policy {plan.policy.name}, whose steps read few of all entries: leave one "
            "of them out",
            setting="decode_budget",
        )
    if plan.layout.kv_dtype is not None:
        raise FastKVError(
            f"kv_dtype does not go with policy {plan.policy.name}, whose steps look up single entries, while these are "
            "packed in blocks: leave one of them out",
            setting="kv_dtype",
        )
    if cache is not None and not cache.is_even:
        raise FastKVError(
            f"policy {plan.policy.name} cannot go on with a cache whose heads hold different numbers of entries: take "
            "policy full"
        )


def _check_shared(plan: RequestPlan, cache: Past | None) -> None:
    """FastKVError for what does not go with layers that read others."""
    name = plan.policy.name
    for refused, what in (
        (cache is not None, "a sequence that continues from a cache"),
        (plan.decode_budget is not None, "decode_budget"),
        (plan.layout.kv_dtype is not None, "kv_dtype"),
        (any(plan.reads_few), f"policy {name}, whose steps read few of all entries"),
        (plan.first_pass is not None, f"policy {name}, which reads what it chooses as a prompt of its own"),
        (plan.decides_online, f"policy {name}, which decides during a prefill where tokens are dropped"),
        (plan.policy.over_layers and plan.compresses, f"policy {name}, whose layers compete for one budget"),
        (plan.lookahead > 0, "lookahead, which lets the layers choose twice"),
    ):
        if refused:
            raise FastKVError(f"share_layers does not go with {what}: leave one of the two out", setting="share_layers")


def _without_reduction(policy: Policy, layer: int, n_layers: int, n_tokens: int) -> LayerPlan:
    """Of a layer that sees all tokens, whatever the policy propagates, and propagates them."""
    kept = min(policy.budget(layer, n_layers, n_tokens), n_tokens)
    return LayerPlan(n_tokens, kept, None, min(policy.least(layer, n_layers, n_tokens), kept))


def _bounded_capacities(plan: RequestPlan, budget: DecodeBudget) -> tuple[int, ...]:
    """Entries of each layer's KV heads, where they are dropped again while the answer grows."""
    return tuple(round_up(min(layer.kept + plan.max_tokens, budget.most(layer.kept))) for layer in plan.layers)


def keeping_all(policy: Policy) -> Policy:
    """What keeps whole whatever comes after the tokens of a policy."""
    return policy.keeping_all() or FullKV()


def chooses_again(policy: Policy, n_layers: int, n_tokens: int, cache: Past) -> bool:
    """Whether a sequence is compressed again when `n_tokens` new ones continue it.

    By a policy that can (Policy.compresses_again), if there are more new tokens than its observation window. Heads of
    different lengths are chosen once only, and so are packed entries, which would be packed again; a first pass reads a
    prompt from its beginning only.
    """
    once = policy.per_head or cache.layout.per_head or cache.layout.kv_dtype is not None
    can = policy.compresses_again and not once and policy.first_pass(n_layers, n_tokens) is None
    return can and n_tokens > policy.window


def _layers_continued(policy: Policy, past: Sequence[int], n_tokens: int, n_in_all: int) -> list[LayerPlan]:
    """As `plan_layers`, for new tokens after `past` entries of each layer: budgets count from the whole sequence."""
    n_layers, continued = len(past), []
    for layer, (plan, before) in enumerate(zip(plan_layers(policy, n_layers, n_tokens), past, strict=True)):
        kept = min(policy.budget(layer, n_layers, n_in_all), before + plan.seen)
        least = min(policy.least(layer, n_layers, n_in_all), kept)
        continued.append(LayerPlan(plan.seen, kept, plan.propagated, least))
    return continued


def _layout(policy: Policy, compresses: bool, kv_dtype: str | None) -> type[KVLayer]:
    """How the layers of a new cache store their entries."""
    plain = _plain_layout(policy, compresses)
    return plain if kv_dtype is None else quantised(plain, kv_dtype)


def _plain_layout(policy: Policy, compresses: bool) -> type[KVLayer]:
    if policy.layout is not None:
        return policy.layout
    if not (policy.per_head and compresses):
        return DenseLayer
    return ModelWideLayer if policy.over_layers else PerHeadLayer


def position_limit(
    config: ModelConfig, policy: Policy, n_tokens: int, cache: Past | None = None, evicts: bool = False
) -> int:
    """The positions that the sequence may take, in tokens; FastKVError if the prompt alone takes more.

    Where a policy drops tokens of a model with a sliding window, or a decode budget is to drop some (evicts), that
    window is the limit: which of the kept entries have left it is not tracked.
    """
    limit = config.context_length
    n_before = 0 if cache is None else cache.position
    n_in_all = n_before + n_tokens
    after = f" after the {n_before} before them" if n_before else ""
    if n_in_all > limit:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens{after}, but the model's context (max_position_embeddings) is {limit}; "
            "shorten it",
            setting="prompt",
        )
    window = config.sliding_window
    dropped = cache is not None and cache.whole_from > 0
    chooses = cache is None or chooses_again(policy, config.n_layers, n_tokens, cache)
    if window is None or not (evicts or dropped or (chooses and drops_tokens(policy, config.n_layers, n_in_all))):
        return limit
    if n_in_all > window and evicts:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens{after}, more than the model's sliding_window of {window}, where "
            "decode_budget cannot drop entries; leave it out, or shorten the prompt",
            setting="decode_budget",
        )
    if n_in_all > window:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens{after}, more than the model's sliding_window of {window}, where policy "
            f"{policy.name} cannot drop tokens; use policy full, or shorten it",
            setting="prompt",
        )
    return min(limit, window)
