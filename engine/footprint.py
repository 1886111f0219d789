"""How much memory a request takes at its worst moment, worked out from its plan and the model's shapes before it runs.

A request holds its KV cache, the buffers that its layers share (engine/workspace.py), and some lists of positions. On
top comes what one step of one layer makes and lets go again: the largest such step counts. Each function here is one
step, and says of which tensors it is the sum; tests/test_footprint.py compares the sums with what is alive in a run.

Not counted is what torch's products take for themselves (`within_products`), and what the allocator keeps of blocks
that were freed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.model_wide import ModelWideLayer
from fastkv.cache.policy import ScoreSizes
from fastkv.cache.scores import queries_at_a_time
from fastkv.engine.attention import QUERY_BLOCK
from fastkv.engine.offloading.sizes import OffloadedLayer, offloaded_layer
from fastkv.engine.output_norms import tokens_at_a_time
from fastkv.engine.plan import Offload, RequestPlan
from fastkv.engine.probe import ProbePlan
from fastkv.engine.projection import chunks
from fastkv.engine.speculation.lookup import lookup_bytes
from fastkv.kernels.int8 import floats_at_a_time
from fastkv.kernels.packing import SCHEMES, scratch
from fastkv.models.config import ModelConfig
from fastkv.models.layers import table_size
from fastkv.models.llama import Llama

_INDEX = 8  # bytes of an int64: positions and indices
_FLOAT = 4  # bytes of a float32: scores and logits
_BLOCKS = 4 << 20  # bytes of a thread's blocks in a product (measured by benchmarks/footprint.py)
_DRAWING = 60  # bytes for each logit while a token is drawn: sorted, with their places, and float64 probabilities


def within_attention(n_rows: int, mask: int, itemsize: int) -> int:
    """What torch's attention holds besides its result, and no one sees: a sum for each row, and a mask as values."""
    return n_rows * _FLOAT + mask * itemsize


def within_products(config: ModelConfig, threads: int) -> int:
    """What torch's products take for themselves: blocks of both matrices in another order, by each thread.

    A few MiB, and no more than the largest matrix has. Not counted where a request is refused.
    """
    largest = 2 * config.hidden_size * config.intermediate_size * _FLOAT
    return threads * min(_BLOCKS, _BLOCKS // 4 + largest)


class Footprint(NamedTuple):
    """Bytes of a request at its worst moment.

    cache: its slots. held: K and V of all tokens, where a policy holds them until all layers have run. workspace: by
    the names of the buffers. lists: positions, indices and rotations. step: what the largest step makes besides.
    host, host_step: the same two of an offloaded prefill on the host, where that has another memory than the device;
    they are not in the total.
    """

    cache: int
    held: int
    workspace: dict[str, int]
    lists: int
    step: int
    host: Mapping[str, int] = {}
    host_step: int = 0

    @property
    def buffers(self) -> int:
        """Bytes of the workspace."""
        return sum(self.workspace.values())

    @property
    def total(self) -> int:
        return self.cache + self.held + self.buffers + self.lists + self.step

    @property
    def on_host(self) -> int:
        """Bytes of host memory, of an offloaded prefill for a GPU."""
        return sum(self.host.values()) + self.host_step

    def in_one_memory(self) -> Footprint:
        """The same on a CPU, which is its own host."""
        return self._replace(
            workspace={**self.workspace, **self.host}, step=max(self.step, self.host_step), host={}, host_step=0
        )


def footprint(
    model: Llama,
    plan: RequestPlan,
    cache: int,
    batch: int = 1,
    slots: int = 1,
    draws: bool = False,
    judged: int = 1,
    looks_up: bool = False,
) -> Footprint:
    """Of a prefill of `batch` sequences and of the steps of `slots` that decode together, whose caches are `cache`.

    draws: whether any token is drawn at random. judged: tokens of a sequence that one step may take. looks_up: whether
    the text drafts, of which a copy is held then (engine/speculation/lookup.py), on the host.
    """
    shapes = _Shapes.of(model, plan, batch)
    seen = plan.n_tokens
    workspace: dict[str, int] = {}
    host: dict[str, int] = {}
    host_step = 0
    steps = [shapes.decoding(slots * judged, draws) + slots * shapes.judging(judged)]
    if plan.first_pass is not None:  # all tokens, but only the layers up to the one that chooses
        whole = _Way(
            seen, seen, seen, 0, 0, plan.first_pass.layer == 0, online=False, least=seen, reads=False, leaving=seen
        )
        _grow(workspace, shapes.buffers(whole))
        steps += [] if whole.keys_first else [shapes.of_layer(whole)]
        steps.append(max(shapes.projecting(seen, keys_only=True), shapes.scoring(seen, 1)))
    for index in range(len(plan.layers)):
        way = _Way.of(plan, index, shapes.on_cpu)
        if plan.offload is not None and index < plan.offload.layers:
            by_host = shapes.of_offloaded_layer(way, index, plan.offload)
            _grow(workspace, by_host.buffers)
            _grow(host, by_host.host_buffers)
            steps.append(by_host.step)
            host_step = max(host_step, by_host.host_step)
            continue
        _grow(workspace, shapes.buffers(way))
        steps.append(shapes.of_layer(way))
    if plan.probe is not None:  # all layers once more, for a part of the prompt at a time
        _grow(workspace, shapes.probing_buffers(plan.probe.longest))
        steps.append(shapes.probing(plan.probe))
    lists = shapes.lists(model)
    if looks_up and shapes.on_cpu:
        lists += lookup_bytes(plan.start + plan.n_tokens + plan.max_tokens)
    if plan.evicts is not None:
        lists += slots * shapes.sums(plan.evicts)
        steps.append(shapes.evicting(plan.evicts))
    if any(plan.reads_few):
        index, reading = plan.index_nbytes, shapes.rows_read() if plan.max_tokens else 0
        lists += (slots - 1) * (index + reading)  # of those that decode meanwhile; its own comes after the layers
        steps.append(batch * (index + max(taken for _, taken in plan.index_bytes)))
        steps.append(batch * (index + reading) + (shapes.choosing() if plan.max_tokens else 0) + steps[0])
    said = Footprint(cache, batch * plan.held_nbytes, workspace, lists, max(steps), host, host_step)
    return said.in_one_memory() if shapes.on_cpu else said


def _grow(workspace: dict[str, int], needs: dict[str, int]) -> None:
    """Buffers only ever grow."""
    for name, size in needs.items():
        workspace[name] = max(size, workspace.get(name, 0))


class _Way(NamedTuple):
    """How a layer is computed (engine/prefill.py: LayerRun.layer).

    seen, kept, out: tokens that it sees, entries that it keeps, tokens whose attention and MLP it computes. leaving:
    tokens that the next layer sees, which a GPU may choose when all have been computed. past: entries that its cache
    holds already. queries: of its last tokens, how many score (0: nothing is scored).
    keys_first: queries only of the tokens that leave it. online: which these are shows then; perhaps all. least:
    entries that it keeps at the least. reads: K and V of another layer, and has none of its own.
    """

    seen: int
    kept: int
    out: int
    past: int
    queries: int
    keys_first: bool
    online: bool
    least: int
    reads: bool
    leaving: int

    @classmethod
    def of(cls, plan: RequestPlan, index: int, on_cpu: bool) -> _Way:
        """Of a layer of a plan."""
        layer, past, last = plan.layers[index], plan.past[index], index == len(plan.layers) - 1
        until = next((at for at, each in enumerate(plan.layers) if each.propagated is not None), -1)
        online = plan.decides_online and index <= until
        drops = layer.propagated is not None or online
        keys_first = last or (drops and on_cpu)
        out = 1 if last else layer.propagated if keys_first and layer.propagated and not online else layer.seen
        reads = bool(plan.shared) and plan.shared[index] != index
        scores = drops or (layer.least < past + layer.seen and not reads)
        queries = (plan.policy.n_queries if drops else plan.policy.window) if scores else 0
        kept, least = (layer.seen, layer.seen) if reads else (layer.kept, layer.least)
        leaving = 1 if last or online else layer.propagated or layer.seen
        return cls(layer.seen, kept, out, past, queries, keys_first, online, least, reads, leaving)

    @property
    def entries(self) -> int:
        return self.past + self.seen

    @property
    def counts(self) -> bool:
        """Whether its scores say how many entries it keeps."""
        return self.least < self.kept


@dataclass(frozen=True)
class _Shapes:
    """What the sizes of tensors are made of. All methods give bytes; T tokens of each of `batch` sequences."""

    plan: RequestPlan
    batch: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    item: int
    norms: bool
    int8: bool
    rotations: int
    device: torch.device
    ranks: int

    @classmethod
    def of(cls, model: Llama, plan: RequestPlan, batch: int) -> _Shapes:
        config = model.config
        return cls(
            plan=plan,
            batch=batch,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.n_heads,
            kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            item=model.dtype.itemsize,
            norms=model.blocks[0].self_attn.has_norms,
            int8=model.lm_head.scale is not None,
            rotations=len(model.rotary.embeddings),
            device=model.device,
            ranks=config.n_ranks,
        )

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def values(self, n_tokens: int, width: int) -> int:
        """[B, T, width] in the model's dtype."""
        return self.batch * n_tokens * width * self.item

    def of_heads(self, n_tokens: int, n_heads: int) -> int:
        """[B, n_heads, T, D] in the model's dtype."""
        return self.values(n_tokens, n_heads * self.head_dim)

    # --- what stays ---

    def buffers(self, way: _Way) -> dict[str, int]:
        """The workspace of a layer: hidden states, those that leave it, q, k and v; with those of its cache, too."""
        heads = 2 * self.kv_heads + (0 if way.keys_first else self.heads)
        sizes = {"hidden": self.values(way.seen, self.hidden), "heads": self.of_heads(way.seen, heads)}
        if way.reads:
            del sizes["heads"]
        if way.leaving < way.seen or way.online:
            sizes["other hidden"] = self.values(way.leaving, self.hidden)
        if way.online or (way.reads and not way.keys_first):
            sizes["queries"] = self.of_heads(way.seen, self.heads)
        if way.past and way.queries:
            sizes |= dict.fromkeys(("keys", "values"), self.of_heads(way.entries, self.kv_heads))
        return sizes

    def probing_buffers(self, n_tokens: int) -> dict[str, int]:
        """Hidden states, q, k and v of a probe."""
        heads = self.of_heads(n_tokens, self.heads + 2 * self.kv_heads)
        return {"hidden": self.values(n_tokens, self.hidden), "heads": heads}

    def lists(self, model: Llama) -> int:
        """int64: ids and positions, of the tokens that layers see and of what they keep; and the rotation tables."""
        plan, n_tokens = self.plan, self.plan.n_tokens
        count = 2 * n_tokens  # ids and positions
        if not plan.compresses:
            count += max(plan.past) + n_tokens  # one row for all layers and heads
        for index, (layer, past) in enumerate(zip(plan.layers, plan.past, strict=True)):
            whole = past + layer.seen
            if layer.propagated is not None:
                count += 3 * layer.propagated  # ids, positions, and which they are
            stores = not plan.shared or plan.shared[index] == index
            if plan.compresses and stores and (past or layer.least < whole):
                count += self.kv_heads * (layer.kept if not past else layer.kept + whole)
        return self.batch * count * _INDEX + self.table_growth(model)

    def table_growth(self, model: Llama) -> int:
        """cos and sin [P, D] for more positions than the model's tables have now."""
        wanted = table_size(max(self.plan.past) + self.plan.positions)
        return 0 if wanted <= model.rotary.reserved else self.rotations * 2 * wanted * self.head_dim * self.item

    # --- what a step makes and lets go ---

    def of_layer(self, way: _Way) -> int:
        """The largest step of a layer."""
        steps = [] if way.reads else [self.projecting(way.seen, way.keys_first)]
        if way.reads and not way.keys_first:
            steps.append(self.querying(self.chunk(way.seen)))
        if way.queries or self.plan.policy.needs_all_queries:
            queries = 0
            if way.keys_first and self.plan.policy.needs_all_queries:  # outside the buffers
                queries = self.of_heads(way.seen, self.heads)
                steps.append(self.querying(way.seen))
            steps.append(queries + self.scoring(way.entries, way.queries))
        if way.counts:
            steps.append(self.counting(way.entries))
        if not way.reads and (way.kept < way.entries or way.counts or self.plan.layout.per_head):
            steps.append(self.storing(way.entries, way.kept) + self.packing(way.kept))
        elif self.plan.layout.kv_dtype is not None:
            steps.append(self.packing(way.kept))
        attended, few = self.of_heads(way.out, self.heads), way.out < way.seen
        if way.past and self.plan.layout.kv_dtype is not None:  # what is packed and what is new, read together
            attended += 2 * self.of_heads(way.past + way.entries, self.kv_heads)
        if few:  # q of these alone, and where they stand
            steps.append(self.querying(way.out))
            attended += attended + 2 * self.rotations * self.values(way.out, self.head_dim)
        steps.append(attended + self.attending(way.out, way.entries, masked=few or way.past > 0))
        steps.append(attended + self.finishing(way.out))
        return max(steps)

    def of_offloaded_layer(self, way: _Way, index: int, offload: Offload) -> OffloadedLayer:
        """Of a layer that goes by host memory, where its policy scores."""
        scored = way.queries > 0
        out = 1 if index == len(self.plan.layers) - 1 else self.plan.layers[index].propagated or way.seen
        scoring = replace(self, device=torch.device("cpu")).scoring(way.entries, way.queries) if scored else 0
        stays = index + 1 < offload.layers
        return offloaded_layer(self, offload.chunk, way.seen, way.kept, out, way.queries, scoring, stays)

    def probing(self, probe: ProbePlan) -> int:
        """The largest step of a probe, besides the scores of all layers, once as parts and once joined."""
        n_tokens, n_entries = probe.longest, probe.n_tokens + probe.longest
        competing = probe.sinks + probe.chunk + n_tokens
        attended = self.of_heads(n_tokens, self.heads)
        layer = [
            self.projecting(n_tokens, keys_only=False),
            self.of_heads(competing, self.kv_heads) + self.scoring(competing, n_tokens),
            attended + self.attending(n_tokens, n_entries, masked=True),
            attended + self.finishing(n_tokens),
        ]
        scores = len(self.plan.layers) * self.batch * self.kv_heads * probe.n_tokens * _FLOAT
        return scores + max(*layer, scores)

    def projecting(self, n_tokens: int, keys_only: bool) -> int:
        """A chunk's normed hidden states, their projection, and a copy that is turned (with norms two more)."""
        chunk = self.chunk(n_tokens)
        turned = self.kv_heads + (0 if keys_only else self.heads)
        made = self.of_heads(chunk, turned + self.kv_heads)
        return (
            self.values(chunk, self.hidden)
            + self.product(made, self.hidden, (turned + self.kv_heads) * self.head_dim)
            + (2 if self.norms else 1) * self.of_heads(chunk, turned)
        )

    def querying(self, n_tokens: int) -> int:
        """The queries of some tokens: normed hidden states, their projection, and it turned, by way of a copy."""
        q = self.of_heads(n_tokens, self.heads)
        return (
            self.values(n_tokens, self.hidden)
            + self.product(q, self.hidden, self.heads * self.head_dim)
            + (3 if self.norms else 2) * q
        )

    def scoring(self, n_entries: int, n_queries: int) -> int:
        """Attention of the last queries, float32 [B, Hq, n, T]: logits and weights; keys in float32, if need be.

        Or what the policy says that it holds.
        """
        sizes = ScoreSizes(self.batch, self.heads, self.kv_heads, self.head_dim, n_entries, self.device)
        told = self.plan.policy.scratch(sizes)
        if told is not None:
            return told * _FLOAT + self.joining(n_entries)
        if self.plan.policy.needs_all_queries or self.plan.probe is not None:
            n_queries = queries_at_a_time(self.batch, self.heads, n_entries, self.device)
        n_queries = max(1, min(n_queries, n_entries))
        keys = self.batch * self.kv_heads * n_entries * self.head_dim * _FLOAT if self.copies_keys else 0
        one = self.batch * self.heads * n_entries * _FLOAT  # of one query of each head
        made = n_queries * one + self.norming(n_entries)  # of the weights, when the logits are gone
        return max(keys + (2 * n_queries + 1) * one, made) + self.joining(n_entries)

    def joining(self, n_entries: int) -> int:
        """Scores of all ranks' heads, as each gave them, and as one tensor."""
        if self.ranks == 1:
            return 0
        return 2 * self.ranks * self.batch * self.kv_heads * n_entries * _FLOAT

    def counting(self, n_entries: int) -> int:
        """How many entries to keep: scores, what each holds of their mass, and their order, for one number tried."""
        return 6 * self.batch * self.kv_heads * n_entries * _INDEX

    def norming(self, n_entries: int) -> int:
        """Values through the output projection, some tokens at a time, for policies that ask for that."""
        norm = getattr(self.plan.policy, "norm", None)
        if norm not in ("l1", "l2"):
            return 0
        width, nbytes = (self.head_dim, 4 * _FLOAT) if norm == "l2" else (self.hidden, 2 * self.item)  # of each value
        one = self.batch * self.heads * width
        return nbytes * one * min(n_entries, tokens_at_a_time(one, self.device))

    @property
    def copies_keys(self) -> bool:
        """Whether scores need the keys in float32: on a CPU of a short dtype."""
        return self.on_cpu and self.item < _FLOAT

    def storing(self, n_entries: int, kept: int) -> int:
        """K and V that are kept, gathered, and which they are; sorted by head where heads keep different numbers."""
        index = self.batch * self.kv_heads * kept * _INDEX
        if self.plan.layout.per_head:
            index = 5 * index + 2 * self.batch * self.kv_heads * n_entries * _INDEX
        return 2 * self.of_heads(kept, self.kv_heads) + index

    def packing(self, n_entries: int) -> int:
        """Some blocks as float32: their values, these less the minimum, over the scale, and codes of a byte or two."""
        if self.plan.layout.kv_dtype is None:
            return 0
        scheme = SCHEMES[self.plan.layout.kv_dtype]
        heads = 1 if self.plan.layout.per_head else self.kv_heads
        at_once = scratch(heads, -(-n_entries // scheme.block), scheme.block, self.head_dim)
        return at_once * (4 * _FLOAT + 2)

    def attending(self, n_queries: int, n_entries: int, masked: bool) -> int:
        """Under a mask: blocks of queries, which are then joined, and the mask of one."""
        if not masked or n_queries == 1:
            return within_attention(self.batch * self.heads * n_queries, 0, self.item)
        mask = self.batch * min(QUERY_BLOCK, n_queries) * n_entries  # bools
        return 2 * self.of_heads(n_queries, self.heads) + mask + within_attention(0, mask, self.item)

    def finishing(self, n_tokens: int) -> int:
        """A chunk's MLP: normed hidden states, gate and up, their product by way of the activation.

        Or the output projection: what is attended, in rows, and its product.
        """
        chunk = self.chunk(n_tokens)
        gate_up, half = (self.values(chunk, width * self.inner) for width in (2, 1))
        hidden = self.values(chunk, self.hidden)
        first = self.product(gate_up, self.hidden, 2 * self.inner)
        last = gate_up + half + self.product(hidden, self.inner, self.hidden)
        attended = self.of_heads(chunk, self.heads) + self.product(hidden, self.heads * self.head_dim, self.hidden)
        return max(hidden + max(first, gate_up + 2 * half, last), attended)

    def product(self, result: int, n_in: int, n_out: int) -> int:
        """The result of a product with a matrix; of an int8 one also its parts, and the weights of one as floats."""
        if not self.int8:
            return result
        floats = min(n_in * n_out, floats_at_a_time())
        parts = result if n_in * n_out > floats else 0
        return result + parts + floats * (_FLOAT + (self.item if self.item < _FLOAT else 0))

    def chunk(self, n_tokens: int) -> int:
        """Tokens of the largest chunk."""
        device = "cpu" if self.on_cpu else "meta"  # a device that is planned for need not be there
        return max(end - start for start, end in chunks(torch.empty(1, n_tokens, 0, device=device)))

    # --- a bounded cache (cache/bounded.py) ---

    def sums(self, budget: DecodeBudget) -> int:
        """Of one sequence: what each entry has received, float32, and where it stands."""
        entries = sum(budget.most(count) for count in self.plan.longest)
        return entries * self.kv_heads * (_FLOAT + _INDEX)

    def evicting(self, budget: DecodeBudget) -> int:
        """What stays of a layer, copied (of all layers, where these share memory), and what chooses it.

        Where heads differ, also what they all hold, in as much memory as if each were the longest. Or the attention of
        one query, its logits and weights.
        """
        most, n_layers = max(map(budget.most, self.plan.longest)), len(self.plan.layers)
        stays = 2 * self.of_heads(min(most, budget.entries), self.kv_heads)
        if issubclass(self.plan.layout, ModelWideLayer):
            stays *= n_layers
        work = 5 * self.kv_heads * most * _INDEX  # positions, scores, and their order
        if self.plan.layout.per_head:
            work = max(work, 2 * self.of_heads(most, self.kv_heads))
        keys = self.of_heads(most, self.kv_heads) // self.item * _FLOAT if self.copies_keys else 0
        return max(stays + work, keys + 3 * self.heads * most * _FLOAT)

    # --- steps that read few entries (cache/reader.py) ---

    def rows_read(self) -> int:
        """Of one sequence: K and V of what a step reads, gathered."""
        return 2 * self._most_read * self.kv_heads * self.head_dim * self.item * 9 // 8  # see cache/pool.py: bucket

    def choosing(self) -> int:
        """Of one sequence: which entries a step reads, joined and as rows; products, scores, order of all."""
        ranked = max(layer.kept for layer in self.plan.layers) + self.plan.max_tokens
        products = 5 * self.heads * ranked * _FLOAT  # themselves, and twice in float64
        return products + self.kv_heads * (4 * self._most_read * _INDEX + ranked * (_FLOAT + _INDEX))

    @property
    def _most_read(self) -> int:
        """Entries that a step reads of a head, at most."""
        plan = self.plan
        return plan.policy.read_budget(plan.start + plan.n_tokens + plan.max_tokens)

    def judging(self, count: int) -> int:
        """Of `count` tokens of a sequence in one step besides: K and V of each layer, and what each does not see.

        The mask is one for all layers, for each query head of a KV head, and repeats a smaller one, which is made of
        bools and zeros (kernels/row_attention.py). As if layers held everything, as those do that judge a draft's.
        """
        if count == 1:
            return 0
        recorded = len(self.plan.layers) * 2 * self.of_heads(count, self.kv_heads) // self.batch
        entries = self.plan.start + self.plan.n_tokens + self.plan.max_tokens
        mask = count * entries * max((self.heads // self.kv_heads + 1) * self.item, 1 + 2 * self.item)
        mask += entries * _INDEX
        return recorded + (mask if self.on_cpu and self.plan.layout.kv_dtype is None else 0)

    def decoding(self, slots: int, draws: bool) -> int:
        """A step of `slots` tokens: its MLP, or its logits, and what is drawn from them."""
        one = (self.hidden + 4 * self.inner) * self.item
        if self.plan.layout.kv_dtype is not None:  # logits of the entries, weights, and these and queries times scales
            scheme, longest = SCHEMES[self.plan.layout.kv_dtype], max(self.plan.longest) + self.plan.max_tokens
            n_blocks = -(-longest // scheme.block)
            blocks = scratch(self.kv_heads, n_blocks, scheme.block, self.head_dim)
            queries = 2 * self.heads * self.head_dim * n_blocks
            one = max(one, (4 * self.heads * longest + 2 * blocks + queries) * _FLOAT)
        return slots * max(one, self.vocab * (self.item + _FLOAT + (_DRAWING if draws else 0)))
