"""Prefill by host memory, of prompts of which one layer is more than the device holds. The layer loop is prefill.py's.

Hidden states of all tokens, and K and V of one layer, lie on the host. The device holds a chunk of tokens at a time,
and what these attend to streams by (host_blocks.py, streamed_attention.py). Once K and V are complete, the policy
scores on the host, where they lie; what it keeps goes to the cache on the device. Layers after TSP see few tokens, and
run the usual way. What still grows with the prompt on the device is the cache, ids and positions, and the table of the
rotation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import Kept, Part
from fastkv.cache.mass import MassOfLayers
from fastkv.cache.policy import Observation
from fastkv.engine.attention import AUTO
from fastkv.engine.offloading.host_blocks import Block, blocks_of, lanes_of
from fastkv.engine.offloading.streamed_attention import Places, StreamedAttention
from fastkv.engine.plan import RequestPlan
from fastkv.engine.prefill import LayerRun
from fastkv.engine.tsp import TokenState
from fastkv.engine.workspace import Workspace, copy
from fastkv.models.layers import Rope
from fastkv.models.llama import Llama

_HOST = torch.device("cpu")


def kind_of(plan: RequestPlan) -> type[LayerRun]:
    """How the layers of a plan are run."""
    return LayerRun if plan.offload is None else OffloadedRun


class OffloadedRun(LayerRun):
    """One prefill whose first layers go by host memory: `state.hidden` is [B, T, E] there, until their last one.

    entries: K and V of the layer that runs, [B, T, 2 Hkv, D], on the host: a token's own lie together, so that a chunk
    of tokens is one piece of memory.
    """

    entries: Tensor

    def __init__(
        self,
        model: Llama,
        plan: RequestPlan,
        cache: KVCache,
        workspace: Workspace,
        attention: str = AUTO,
        whole: KVCache | None = None,
    ) -> None:
        super().__init__(model, plan, cache, workspace, attention, whole)
        assert plan.offload is not None, "the usual way is LayerRun"
        assert whole is None, "drafts have two caches"
        n_layers, propagated = plan.offload.layers, plan.layers[plan.offload.layers - 1].propagated
        assert n_layers == len(plan.layers) or propagated is not None, "all hidden states would go to the device"
        self.store = self._store_from_host
        self.offload, self.host = plan.offload, workspace.host
        self.lanes = lanes_of(model.device)
        self.mass = MassOfLayers(cache.batch, _HOST, known=True)
        self.later = LayerRun(model, plan, cache, workspace, attention)  # of the layers after them
        self.idle_on_host = "other host hidden"  # of the two buffers there for hidden states the one not in use

    def start(self, ids: Tensor, position: int = 0) -> tuple[TokenState, Rope]:
        """Embedding, a chunk at a time, and rotation: ids int64 [B, N] on the device."""
        hidden = self.host.take("host hidden", (*ids.shape, self.model.config.hidden_size), like=self.model)
        for start, end in self._chunks(ids.shape[1]):
            copy(hidden[:, start:end], self.model.embed(ids[:, start:end], out=self._chunk(hidden, end - start)))
        return TokenState.start(ids, hidden, position), self.model.rope_of_range(position, ids.shape[1])

    def layer(self, layer: int, state: TokenState, rope: Rope) -> tuple[TokenState, Rope]:
        if layer >= self.offload.layers:
            return self._usual(layer, state, rope)
        last, drops = layer == len(self.layers) - 1, self.layers[layer].propagated is not None
        q = self._last_queries(layer, state.hidden, rope)  # now: hidden is written over
        n_tokens, config = state.ids.shape[1], self.model.config
        shape = (state.ids.shape[0], n_tokens, 2 * config.n_kv_heads, config.head_dim)
        self.entries = self.host.take("host keys and values", shape, like=self.model)
        if last or drops:
            self._project_keys(layer, state.hidden, rope)
        else:
            self._all_tokens(layer, state.hidden, rope)
        self.host.wait(self.model.device)
        k, v = _heads(self.entries)
        _, chosen = self.select(layer, state, self.host.to_host(q), k, v)
        if last:
            chosen = torch.full((shape[0], 1), n_tokens - 1)
        return (state, rope) if chosen is None else self._some_tokens(layer, state, chosen)

    def _usual(self, layer: int, state: TokenState, rope: Rope) -> tuple[TokenState, Rope]:
        """A layer after those that go by host memory."""
        if layer == self.offload.layers:
            self.mass.move(lambda x: self.host.to_device(x, self.model.device))
            self.later.mass = self.mass
        result = self.later.layer(layer, state, rope)
        self.positions = self.later.positions
        return result

    # --- on the device, a chunk at a time ---

    def _all_tokens(self, layer: int, hidden: Tensor, rope: Rope) -> None:
        """Keys and values, attention and MLP of every token: into `entries` and `hidden`."""
        block, window = self.model.blocks[layer], self.windows[layer]
        n_q, n_kv, _ = block.self_attn.heads
        for start, end in self._chunks(hidden.shape[1]):
            chunk = self._load(hidden, start, end)
            heads = self._room("heads", hidden.shape[0], n_q + 2 * n_kv, end - start)
            block.project(chunk, rope.at(start, end), out=heads)
            own = self._save_entries(start, end, heads[:, n_q:])
            attention = StreamedAttention(heads[:, :n_q], Places.of_range(start, end, self.model.device), n_kv, window)
            attention.see(start, *_heads(own))
            self._see_blocks(attention, start, start - 1, window)
            block.finish_(chunk, attention.result())
            copy(hidden[:, start:end], chunk)

    def _project_keys(self, layer: int, hidden: Tensor, rope: Rope) -> None:
        """Keys and values of every token, into `entries`."""
        block = self.model.blocks[layer]
        for start, end in self._chunks(hidden.shape[1]):
            heads = self._room("heads", hidden.shape[0], 2 * block.self_attn.heads[1], end - start)
            block.project_kv(self._load(hidden, start, end), rope.at(start, end), out=heads)
            self._save_entries(start, end, heads)

    def _some_tokens(self, layer: int, state: TokenState, chosen: Tensor) -> tuple[TokenState, Rope]:
        """Attention and MLP of the tokens at `chosen`, int64 [B, n] on the host, alone: those, and their rotation."""
        block, window, n_kv = self.model.blocks[layer], self.windows[layer], self.model.config.n_kv_heads
        stays = layer + 1 < min(self.offload.layers, len(self.layers))
        indices = self.host.to_device(chosen, self.model.device)
        hidden = self._gather_hidden(state.hidden, chosen, stays)
        state = TokenState(state.ids.gather(1, indices), hidden, state.positions.gather(1, indices))
        rope = self.model.rope(state.positions)
        for start, end in self._chunks(chosen.shape[1]):
            chunk = self._load(hidden, start, end) if stays else hidden[:, start:end]
            q = block.project_q(chunk, rope.at(start, end))
            places = Places.of(indices[:, start:end], chosen[:, start:end])
            attention = StreamedAttention(q, places, n_kv, window)
            self._see_blocks(attention, places.firsts[0], places.lasts[-1], window)
            block.finish_(chunk, attention.result())
            if stays:
                copy(hidden[:, start:end], chunk)
        return state, rope

    def _see_blocks(self, attention: StreamedAttention, first: int, last: int, window: int | None) -> None:
        """Let queries from the place `first` on attend to the keys up to the place `last`, block by block."""
        nearest = 0 if window is None else first - window + 1
        chunks = self._chunks(self.entries.shape[1])
        blocks = [(start, end) for start, end in chunks if start <= last and end > nearest]
        for (start, _), block in zip(blocks, self._stream(blocks), strict=True):
            attention.see(start, *_heads(block))

    def _stream(self, blocks: list[Block]) -> Iterator[Tensor]:
        """Blocks of the entries on the device, [B, n, 2 Hkv, D]."""
        longest = max((end - start for start, end in blocks), default=0)
        shape = (self.entries.shape[0], longest, *self.entries.shape[2:])
        buffers = [self.workspace.take(name, shape, like=self.model) for name in ("one block", "other block")]
        return blocks_of(self.entries, blocks, buffers, self.lanes)

    def _chunks(self, n_tokens: int) -> list[Block]:
        """(start, end) of each chunk of the tokens, as even as can be: a small rest would leave the device idle."""
        count = -(-n_tokens // self.offload.chunk)
        return [(n_tokens * index // count, n_tokens * (index + 1) // count) for index in range(count)]

    def _chunk(self, hidden: Tensor, count: int) -> Tensor:
        """Room for the hidden states of `count` tokens: [B, count, E]."""
        return self.workspace.take("chunk", (hidden.shape[0], count, hidden.shape[2]), like=self.model)

    def _load(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """The hidden states start … end - 1 on the device, until the next chunk's."""
        chunk = self._chunk(hidden, end - start)
        copy(chunk, hidden[:, start:end])
        return chunk

    def _room(self, name: str, batch: int, heads: int, count: int) -> Tensor:
        return self.workspace.take(name, (batch, heads, count, self.model.config.head_dim), like=self.model)

    def _save_entries(self, start: int, end: int, heads: Tensor) -> Tensor:
        """K and V of a chunk, [B, 2 Hkv, n, D], into `entries`; and as they are there, on the device."""
        shape = (heads.shape[0], end - start, *self.entries.shape[2:])
        own = self.workspace.take("chunk of keys and values", shape, like=self.model)
        own.copy_(heads.transpose(1, 2))
        copy(self.entries[:, start:end], own)
        return own

    def _last_queries(self, layer: int, hidden: Tensor, rope: Rope) -> Tensor:
        """q of the last tokens, at which the policy looks: [B, Hq, n, D]."""
        n_tokens = hidden.shape[1]
        first = max(0, n_tokens - self._n_queries(n_tokens))
        return self.model.blocks[layer].project_q(self._load(hidden, first, n_tokens), rope.at(first, n_tokens))

    # --- on the host ---

    def _gather_hidden(self, hidden: Tensor, chosen: Tensor, stays: bool) -> Tensor:
        """The hidden states of the tokens that are propagated: on the host if they stay there, else on the device."""
        index = chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[2])
        shape = (*chosen.shape, hidden.shape[2])
        taken = self.host.take(self.idle_on_host, shape, like=self.model)
        self.idle_on_host = "host hidden" if self.idle_on_host == "other host hidden" else "other host hidden"
        torch.gather(hidden, 1, index, out=taken)
        if stays:
            return taken
        there = self.workspace.take("hidden", shape, like=self.model)
        copy(there, taken)
        return there

    def _observed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, past: int = 0) -> Observation:
        """All on the host; weights are not, and so there is no `output` and no `rotary`."""
        return Observation(layer, q, k, v, past, positions=positions)

    def _positions_with(self, layer: int, new: Tensor) -> Tensor:
        return super()._positions_with(layer, self.host.to_host(new))

    def _store_from_host(self, layer: int, k: Tensor, v: Tensor, kept: Kept, positions: Tensor) -> None:
        """As KVCache.store, of what is on the host, where it is gathered."""
        device = self.model.device
        self.positions = self.host.to_device(positions, device)
        if kept is None:
            self._store_all(layer, self.positions)
            return
        assert isinstance(kept, Tensor), "heads of different lengths stay on the device"
        index = kept.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
        k, v = (self.host.to_device(each.gather(2, index), device) for each in (k, v))
        self.cache.store(layer, k, v, None, self.positions)

    def _keep_all(self, layer: int, state: TokenState, k: Tensor, v: Tensor) -> list[Part]:
        self.mass.keep_all()
        if self.plan.compresses:
            positions = super()._positions_with(layer, state.positions)
        else:  # every layer holds the same, which takes no memory
            positions = self.cache.positions(layer, self.cache.position + self.plan.n_tokens)
        self._store_all(layer, positions)
        return []

    def _store_all(self, layer: int, positions: Tensor) -> None:
        """All entries of a layer into the cache, a chunk at a time; they stand at `positions`, on the device."""
        self.positions = positions
        for index, block in enumerate(self._stream(self._chunks(self.entries.shape[1]))):
            k, v = _heads(block)
            if index == 0:
                self.cache.store(layer, k, v, None, positions, to_come=self.entries.shape[1] - k.shape[2])
            else:
                self.cache.extend(layer, k, v, positions)


def _heads(entries: Tensor) -> tuple[Tensor, Tensor]:
    """K and V, [B, Hkv, n, D] each: views of entries [B, n, 2 Hkv, D]."""
    k, v = entries.transpose(1, 2).chunk(2, dim=1)
    return k, v
